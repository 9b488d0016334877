"""Base of the sources with published files: mirrors, local copies, checksums."""

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from cm3.common.paths import expand
from cm3.common.strict import Float, nearest
from cm3.datasets.images.config import Images, allowed_hosts
from cm3.datasets.spec import SourceWithImages


def _check_url(url: str) -> str:
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ValueError("must be an http:// or https:// URL")
    return url


def _address(root: str, path: str) -> str:
    """Return the URL of a file below a base URL, whose query (a token or signature) stays at the end."""
    base, mark, query = root.partition("?")
    return f"{base.rstrip('/')}/{path}{mark}{query}"


Url = Annotated[str, AfterValidator(_check_url)]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PublishedSource(SourceWithImages):
    """Settings of sources with published files; a subclass states them in `files`."""

    folder: str | None = Field(
        default=None,
        min_length=1,
        description="Local folder with the published files; nothing is downloaded.",
    )
    mirrors: list[Url] = Field(default=[], description="Base URLs of the published files, tried in order.")
    sha256: dict[str, Hex] = Field(default={}, description="Known SHA-256 checksums by file name.")
    sizes: dict[str, int] = Field(default={}, description="Known sizes in bytes by file name.")
    malformed: Float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Largest accepted fraction of malformed lines; they are skipped and counted in stats.json.",
    )
    images: Images = Field(
        default=Images(), description="Local folder of images by item id; default: images are downloaded by URL."
    )

    def files(self) -> dict[str, str]:
        """Return the paths of the published files, relative to a mirror, by kind."""
        raise NotImplementedError

    def local_names(self) -> dict[str, str]:
        """Return the names of `files` in one folder, by kind."""
        return {kind: path.rpartition("/")[2] for kind, path in self.files().items()}

    def image_hosts(self) -> list[str]:
        """Return the hosts that images are downloaded from by default."""
        return []

    @model_validator(mode="after")
    def _local_images_have_a_pattern(self) -> "PublishedSource":
        if self.images.folder is not None and self.images.pattern is None:
            raise ValueError("images.folder needs images.pattern, such as {item_id}.jpg")
        return self

    @model_validator(mode="after")
    def _facts_are_of_own_files(self) -> "PublishedSource":
        names = self.local_names().values()
        for key, facts in (("sha256", self.sha256), ("sizes", self.sizes)):
            for file in facts:
                if file not in names:
                    raise ValueError(f"{key}: {file!r} is not one of the published files{nearest(file, names)}")
        return self

    @model_validator(mode="after")
    def _files_come_from_somewhere(self) -> "PublishedSource":
        if self.folder is None and not self.mirrors:
            raise ValueError("mirrors: give at least one URL, or set folder to a local copy")
        return self

    def place(self, name: str, kind: str) -> str:
        """Return the path of one of `files`: in the local folder, flat or with the published subfolders, or in raw/."""
        local = self.local_names()[kind]
        if self.folder is None:
            return f"raw/{name}/{local}"
        folder = Path(expand(self.folder))
        choices = [folder / local, folder / self.files()[kind]]
        return str(next((path for path in choices if path.exists()), choices[0]))

    def downloads(self, name: str) -> dict[str, dict[str, Any]]:
        """Return all published files; only those that an experiment reads are downloaded."""
        if self.folder is not None:
            return {}
        local = self.local_names()
        return {
            f"raw/{name}/{local[kind]}": {
                "urls": [_address(root, path) for root in self.mirrors],
                "path": path,
                "sha256": self.sha256.get(local[kind]),
                "size": self.sizes.get(local[kind]),
            }
            for kind, path in self.files().items()
        }

    def prepare_spec(self) -> dict[str, Any]:
        """Return the spec of the prepare stage."""
        local = self.local_names()
        checksums = {
            kind: {"sha256": self.sha256.get(file), "size": self.sizes.get(file)}
            for kind, file in local.items()
            if file in self.sha256 or file in self.sizes
        }
        return {**super().prepare_spec(), "malformed": self.malformed, "checksums": checksums}

    def images_spec(self) -> dict[str, Any]:
        """Return the spec of the images stage."""
        spec = self.images.spec()
        return spec if spec["find"] != "urls" or spec["hosts"] else {**spec, **allowed_hosts(self.image_hosts())}
