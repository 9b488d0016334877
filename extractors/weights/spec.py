"""Specs of backends that load a model: from a hub at one revision, a local file or folder, or a package."""

import re
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cm3.common.errors import UserError
from cm3.common.paths import expand
from extractors.spec import BackendSpec
from extractors.weights.digests import digest_of
from extractors.weights.revisions import COMMIT, commit_of

PACKAGE = "package:"
LOCAL_DIR = "local-dir:"
_PARAMETERS = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)[bB](?![A-Za-z])")
_PATH = re.compile(r"(/|\.{1,2}/|~).*")


class ModelSpec(BackendSpec):
    """A spec whose model has weights. Exactly one place is named that they come from."""

    runtime_fields: ClassVar[frozenset[str]] = BackendSpec.runtime_fields | {"weights", "local_files_only"}
    hub_field: ClassVar[str] = "model"
    """The field that names the hub repository."""

    model: str | None = Field(None, description="Hub id (owner/name), `package:NAME`, or a path, which means weights.")
    revision: str | None = Field(
        None,
        description="Commit of the hub repository, 40 hex digits; without it the newest of the first run is kept.",
    )
    weights: str | None = Field(
        None, description="Local file or folder instead of the hub. Identified by content: it may move."
    )
    local_files_only: bool = Field(False, description="Never ask the hub, use what was downloaded before.")
    precision: Literal["float32", "autocast", "bfloat16"] = Field(
        "float32",
        description="Number format of the model's arithmetic; autocast: bfloat16 where it is sound, else float32.",
    )

    @model_validator(mode="before")
    @classmethod
    def _path_is_weights(cls, data: Any) -> Any:
        """Take `model: /a/path` and `model: local-dir:a/path` as `weights`, so that no path enters the key."""
        model = data.get("model") if isinstance(data, dict) else None
        if not isinstance(model, str):
            return data
        path = model.removeprefix(LOCAL_DIR)
        if path == model and not _PATH.fullmatch(model):
            return data
        if data.get("weights") not in (None, path):
            raise ValueError("model is a path, and weights another; give one of them")
        return {**data, "model": None, "weights": path}

    @field_validator("revision")
    @classmethod
    def _revision_is_a_commit(cls, value: str | None) -> str | None:
        if value is not None and not COMMIT.fullmatch(value):
            raise ValueError(
                "a pinned revision is a commit of 40 hex digits, because branches and tags move; "
                "the model's page lists it under 'Files and versions' > 'History'"
            )
        return value

    @model_validator(mode="after")
    def _one_place(self) -> "ModelSpec":
        places = [p for p in (self.repository, self.weights, self.package) if p is not None]
        if len(places) > 1:
            raise ValueError(f"the weights come from one place only, not from {' and '.join(places)}")
        if not places:
            raise ValueError(f"no weights: give {self.hub_field} + revision (a hub), or weights (a local path)")
        if self.revision and not self.repository:
            raise ValueError(f"revision belongs to a hub id, but {self.hub_field} names none")
        return self

    @property
    def brings_code(self) -> bool:
        """Whether code that comes with the weights may run, and so is a part of what the model is."""
        return False

    @property
    def repository(self) -> str | None:
        """The hub repository's id, if the weights come from a hub."""
        name = getattr(self, self.hub_field)
        return None if name is None or name.startswith(PACKAGE) else name

    @property
    def package(self) -> str | None:
        """The importable package that carries the weights, if one does."""
        name = getattr(self, self.hub_field)
        return name.removeprefix(PACKAGE) if name and name.startswith(PACKAGE) else None

    @property
    def weights_path(self) -> Path | None:
        """The local file or folder of weights, if named, with ~ and environment variables put in."""
        return Path(expand(self.weights)) if self.weights else None

    def weights_mb(self) -> float:
        """Return the memory of the weights in MB: from local files, else from a size such as 7B in the model's name."""
        path = self.weights_path
        if path is not None and path.exists():
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            # Twice: the checkpoint and the model are in memory together while it loads.
            return 2 * sum(file.stat().st_size for file in files) / 1e6 or self.cost.weights_mb
        billions = _PARAMETERS.search(self.model or "")
        return 4000 * float(billions[1]) if billions else self.cost.weights_mb

    def commit(self) -> str | None:
        """Return the commit of the hub repository: the pinned one, else the one that was found first; None without a hub.

        Raises:
            UserError: it is not pinned, and can be found neither on the hub nor among what was downloaded before.
        """
        if self.repository is None or self.revision is not None:
            return self.revision
        return commit_of(self.repository, self.local_files_only)

    def settings(self) -> dict[str, Any]:
        """Return the fields that change the output, the hub's commit among them even where it is not pinned.

        Raises:
            UserError: the commit is not pinned and can't be found.
        """
        commit = self.commit()
        return super().settings() | ({} if commit is None else {"revision": commit})

    def model_identity(self) -> dict[str, Any]:
        """Return the sha256 of local weights or the version of the package that carries them."""
        path = self.weights_path
        if path is not None:
            if not path.exists():
                raise UserError(f"weights = {str(path)!r}: no such file or folder; put the weights there or correct it")
            return {"weights_sha256": digest_of(path, self.brings_code)}
        if self.package is not None:
            try:
                return {"package_version": metadata.version(self.package)}
            except metadata.PackageNotFoundError:
                raise UserError(
                    f"model = {PACKAGE + self.package!r}: the package is not installed; "
                    f"run: pip install {self.package.replace('_', '-')}"
                ) from None
        return {}


class CodeSpec(ModelSpec):
    """A spec of a backend whose models may come with code of their own."""

    trust_remote_code: bool = Field(
        False, description="Run the code that comes with this one model; read it first. Needs revision or weights."
    )

    @model_validator(mode="after")
    def _code_is_pinned(self) -> "CodeSpec":
        if self.trust_remote_code and not (self.revision or self.weights):
            raise ValueError(
                "trust_remote_code runs what the model's repository holds: set revision to the commit whose code "
                "was read, or weights to a local folder"
            )
        return self

    @property
    def brings_code(self) -> bool:
        """Whether code that comes with the weights may run, and so is a part of what the model is."""
        return self.trust_remote_code
