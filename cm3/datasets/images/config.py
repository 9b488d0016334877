"""Settings of product images: folder or download, size limits, placeholders."""

import ipaddress
import re
import string
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from yarl import URL

from cm3.common.strict import Float, Strict
from cm3.datasets.images.alternatives import alternatives_of


def _check_pattern(pattern: str) -> str:
    try:
        fields = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise ValueError(f"not a pattern ({error})") from None
    if not fields or any(n != "item_id" or how or not re.fullmatch(r"(\.\d+)?", s or "") for n, s, how in fields):
        raise ValueError("may hold {item_id} and {item_id:.3} (its first three characters), and at least one of them")
    return pattern


def _check_host(name: str) -> str:
    """Return an entry of the allow-list that URLs can match; raise with the right spelling for another."""
    rest = name.strip().partition("://")[2] if "://" in name else name.strip()
    wildcard = "*." if rest[:1] in ("*", ".") else ""
    host = _host_of(rest.lstrip("*.") if wildcard else rest)
    if not host or "*" in host or ".." in host:
        raise ValueError(
            f"{name!r} matches no host; list each host, such as img.example.com, or *.example.com for all its subdomains"
        )
    if (right := wildcard + host) != name.lower():
        raise ValueError(f"{name!r} matches no host, because it is not a host name alone; write {right}")
    return name


def _host_of(text: str) -> str | None:
    try:
        address = ipaddress.ip_address(text.strip("[]"))
        return URL.build(scheme="http", host=str(address)).host
    except ValueError:
        pass
    try:
        return URL(f"http://{text}").host
    except ValueError:
        return None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
"""List of names; a single name is the same as a list of it, and gives the same key."""
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Host = Annotated[str, AfterValidator(_check_host)]
_Pattern = Annotated[str, AfterValidator(_check_pattern)]
_Patterns = Annotated[list[_Pattern], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]


def allowed_hosts(hosts: Sequence[str]) -> dict[str, Any]:
    """Return the part of an images_spec() that follows from the allow-list: hosts, and alternatives where there are any."""
    alternatives = alternatives_of(hosts)
    return {"hosts": sorted(hosts)} | ({"alternatives": alternatives} if alternatives else {})


class ImageLimits(Strict):
    """Size limits of one image; an image over a limit is `failed` with the reason."""

    max_pixels: int = Field(
        default=64_000_000,
        gt=0,
        le=89_000_000,
        description="largest width x height of an image in pixels, checked before decoding",
    )
    max_bytes: int = Field(default=32_000_000, gt=0, description="largest size of one image file or download in bytes")


class Images(ImageLimits):
    """Source of product images: a local folder, or the URLs in the item table."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"rate", "concurrency", "timeout", "attempts"})

    folder: str | None = Field(
        default=None,
        min_length=1,
        description="local folder of images; without it, images are downloaded from their URLs",
    )
    pattern: _Patterns | None = Field(
        default=None,
        description="path of an item's image in the folder, such as {item_id}.jpg or {item_id:.3}/{item_id}.jpg; "
        "several are tried in order; without it, the item's own image column names the file",
    )
    follow_links: bool = Field(
        default=False,
        description="read images through links that lead out of the folder, such as into the store of DVC, git-annex or a "
        "hub's cache; only for a folder whose links you trust",
    )
    hosts: list[_Host] = Field(
        default=[],
        description="allow-list of hosts for image downloads, at any port; `*.example.com` includes all subdomains",
    )
    placeholders: list[_Digest] = Field(
        default=[],
        description="sha256 digests of placeholder images (`no image`), 64 hex digits each as in the manifest; items "
        "with one of them count as missing",
    )
    private: bool = Field(default=False, description="allow downloads from private and loopback addresses")
    rate: Float = Field(default=50.0, gt=0, description="requests per second to each host")
    concurrency: int = Field(default=16, gt=0, description="simultaneous requests to each host")
    timeout: Float = Field(default=30.0, gt=0, description="seconds without data before a request fails")
    attempts: int = Field(default=5, gt=0, description="tries per URL on 429, 5xx, timeouts and cut connections")

    @model_validator(mode="after")
    def _one_place(self) -> "Images":
        if self.folder is None and self.pattern is not None:
            raise ValueError("pattern needs images.folder, the folder of the images")
        if self.folder is None and self.follow_links:
            raise ValueError("follow_links needs images.folder, the folder of the images")
        if self.folder is not None and self.hosts:
            raise ValueError("set either folder (local images) or hosts (images to download), not both")
        return self

    def limits(self) -> dict[str, Any]:
        """Return the settings that decide which images the stage accepts, as JSON."""
        placeholders = sorted(set(self.placeholders))
        return {"max_pixels": self.max_pixels, "max_bytes": self.max_bytes, "placeholders": placeholders}

    def spec(self) -> dict[str, Any]:
        """Return the settings that decide which images the stage finds and accepts, as JSON."""
        limits = self.limits()
        if self.folder is None:
            return {"find": "urls", "private": self.private, **limits, **allowed_hosts(self.hosts)}
        # Only where it is set: the keys of existing images were computed without it.
        links = {"follow_links": True} if self.follow_links else {}
        return {"find": "folder", "folder": self.folder, "patterns": self.pattern, **limits, **links}
