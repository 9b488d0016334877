"""Content-Encoding of HTTP responses: gzip and deflate, decoded up to a number of bytes."""

import zlib


class EncodingError(Exception):
    """A body that cannot be decoded. The message is the reason, `kind` a short category of it."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def decoded(data: bytes, encoding: str, max_bytes: int) -> bytes:
    """Return a body without its Content-Encoding.

    A body that is called gzip and is not is returned unchanged: servers label files that they did not compress.

    Args:
        data: the body as received.
        encoding: the header's value; empty without one.
        max_bytes: largest allowed size of the result.

    Raises:
        EncodingError: another encoding, cut or corrupt, or larger than `max_bytes`.
    """
    for name in reversed(
        [name for part in encoding.split(",") if (name := part.strip().lower()) not in ("", "identity")]
    ):
        if name in ("gzip", "x-gzip"):
            data = _inflated(data, 31, name, max_bytes) if data.startswith(b"\x1f\x8b") else data
        elif name == "deflate":
            header = len(data) > 1 and data[0] & 15 == 8 and int.from_bytes(data[:2], "big") % 31 == 0
            data = _inflated(data, 15 if header else -15, name, max_bytes)  # some servers leave out the zlib header
        else:
            raise EncodingError("bad answer", f"the answer has Content-Encoding {name}, which is not supported")
    return data


def _inflated(data: bytes, window: int, name: str, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while data:
        inflate = zlib.decompressobj(window)
        try:
            parts.append(inflate.decompress(data, max_bytes + 1 - size))
        except zlib.error as error:
            raise EncodingError("corrupt", f"corrupt: its Content-Encoding {name} is damaged ({error})") from None
        size += len(parts[-1])
        if size > max_bytes:
            raise EncodingError("too many bytes", f"more than the {max_bytes} bytes allowed")
        if not inflate.eof:
            raise EncodingError("truncated", f"corrupt: truncated, its Content-Encoding {name} has no end")
        data = inflate.unused_data if inflate.unused_data.startswith(b"\x1f\x8b") else b""
    return b"".join(parts)
