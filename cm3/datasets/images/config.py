"""Config of where product images are, and what they may be at most."""

import re
import string
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from cm3.common.strict import Float, Strict


def _check_pattern(pattern: str) -> str:
    try:
        fields = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise ValueError(f"not a pattern ({error})") from None
    if not fields or any(n != "item_id" or how or not re.fullmatch(r"(\.\d+)?", s or "") for n, s, how in fields):
        raise ValueError("may hold {item_id} and {item_id:.3} (its first three characters), and at least one of them")
    return pattern


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
"""A list of names; one name alone means the same, and gives the same key."""
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Pattern = Annotated[str, AfterValidator(_check_pattern)]
_Patterns = Annotated[list[_Pattern], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]


class ImageLimits(Strict):
    """What an image may be at most; beyond it is `failed` with the reason."""

    max_pixels: int = Field(
        default=64_000_000, gt=0, le=89_000_000, description="width x height, checked before decoding"
    )
    max_bytes: int = Field(default=32_000_000, gt=0, description="size of one image's file or download")


class Images(ImageLimits):
    """Where product images are: a local folder, or the URLs in the item table."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"rate", "concurrency", "timeout", "attempts"})

    folder: str | None = Field(
        default=None, min_length=1, description="local folder of images; without it, URLs are fetched"
    )
    pattern: _Patterns | None = Field(
        default=None,
        description="path of an item's image in the folder, such as {item_id}.jpg or {item_id:.3}/{item_id}.jpg; "
        "several are tried in order; without it, the item's own image column names the file",
    )
    hosts: list[str] = Field(
        default=[],
        description="hosts that images may be fetched from, at any port; `*.example.com` takes in all below it",
    )
    placeholders: list[_Digest] = Field(
        default=[],
        description="sha256 digests of images that mean `no image`, 64 hex digits each as in the manifest; items "
        "that have one of them are missing",
    )
    private: bool = Field(default=False, description="whether hosts with private or loopback addresses may be asked")
    rate: Float = Field(default=50.0, gt=0, description="requests a second to each host")
    concurrency: int = Field(default=16, gt=0, description="requests at a time to each host")
    timeout: Float = Field(default=30.0, gt=0, description="seconds without an answer before a request is given up")
    attempts: int = Field(default=5, gt=0, description="tries of one URL on 429, 5xx, timeouts and cut connections")

    @model_validator(mode="after")
    def _one_place(self) -> "Images":
        if self.folder is None and self.pattern is not None:
            raise ValueError("pattern needs images.folder, the folder that it is looked up in")
        if self.folder is not None and self.hosts:
            raise ValueError("give either folder (local images) or hosts (images to fetch), not both")
        return self

    def spec(self) -> dict[str, Any]:
        """Return the JSON that decides which images the images stage finds and accepts."""
        limits = {
            "max_pixels": self.max_pixels,
            "max_bytes": self.max_bytes,
            "placeholders": sorted(set(self.placeholders)),
        }
        if self.folder is None:
            return {"find": "urls", "hosts": sorted(self.hosts), "private": self.private, **limits}
        return {"find": "folder", "folder": self.folder, "patterns": self.pattern, **limits}
