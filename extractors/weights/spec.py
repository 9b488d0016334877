"""Base of the settings of backends with weights: from a hub, a local file or folder, or a package."""

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
    """Settings of a model with weights, which come from exactly one location."""

    runtime_fields: ClassVar[frozenset[str]] = BackendSpec.runtime_fields | {"weights", "local_files_only"}
    hub_field: ClassVar[str] = "model"
    """Name of the field with the hub repository."""

    model: str | None = Field(
        None, description="Hub id (owner/name), `package:NAME`, or a local path, equivalent to weights."
    )
    revision: str | None = Field(
        None,
        description="Commit of the hub repository, 40 hex digits; default: the newest one at the first run, then recorded.",
    )
    weights: str | None = Field(None, description="Local file or folder instead of the hub, identified by its content.")
    local_files_only: bool = Field(False, description="Do not contact the hub; use earlier downloads.")
    precision: Literal["float32", "tf32", "autocast", "bfloat16"] = Field(
        "float32",
        description="Number format; tf32: float32 weights, products and convolutions with a mantissa of ten bits on NVIDIA "
        "GPUs; autocast: float32 weights, products in bfloat16, norms and sums in float32.",
    )

    @model_validator(mode="before")
    @classmethod
    def _path_is_weights(cls, data: Any) -> Any:
        """Convert `model: /a/path` and `model: local-dir:a/path` to `weights`, so that no path is part of the key."""
        model = data.get("model") if isinstance(data, dict) else None
        if not isinstance(model, str):
            return data
        path = model.removeprefix(LOCAL_DIR)
        if path == model and not _PATH.fullmatch(model):
            return data
        if data.get("weights") not in (None, path):
            raise ValueError("model and weights are different paths; set one of them")
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
            raise ValueError(f"the weights come from one location only, not from {' and '.join(places)}")
        if not places:
            raise ValueError(f"no weights: set {self.hub_field} and revision (a hub), or weights (a local path)")
        if self.revision and not self.repository:
            raise ValueError(f"revision needs a hub id, but {self.hub_field} is none")
        return self

    @property
    def runs_own_code(self) -> bool:
        """Whether code that comes with the weights may run; its digest is then part of the identity."""
        return False

    @property
    def repository(self) -> str | None:
        """Id of the hub repository, None if the weights come from elsewhere."""
        name = getattr(self, self.hub_field)
        return None if name is None or name.startswith(PACKAGE) else name

    @property
    def package(self) -> str | None:
        """Importable package with the weights, None if they come from elsewhere."""
        name = getattr(self, self.hub_field)
        return name.removeprefix(PACKAGE) if name and name.startswith(PACKAGE) else None

    @property
    def weights_path(self) -> Path | None:
        """Local file or folder of weights with ~ and environment variables expanded, None if they come from elsewhere."""
        return Path(expand(self.weights)) if self.weights else None

    def weights_mb(self) -> float:
        """Return the memory of the weights in MB: from local files, else from a size such as 7B in the model's name."""
        path = self.weights_path
        if path is not None and path.exists():
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            # Twice: the checkpoint and the model are in memory together while it loads.
            return 2 * sum(file.stat().st_size for file in files) / 1e6 or self.cost.weights_mb
        return 4000 * self.named_parameters() / 1e9 or self.cost.weights_mb

    def named_parameters(self) -> int:
        """Return the number of parameters that the model's name states, such as 7B; 0 if it states none."""
        billions = _PARAMETERS.search(self.model or "")
        return round(1e9 * float(billions[1])) if billions else 0

    def commit(self) -> str | None:
        """Return the commit of the hub repository: the pinned one, else the recorded one; None without a hub.

        Raises:
            UserError: it is not pinned, and neither the hub nor an earlier download has one.
        """
        if self.repository is None or self.revision is not None:
            return self.revision
        return commit_of(self.repository, self.local_files_only)

    def settings(self) -> dict[str, Any]:
        """Return the fields that change the output, with the commit of the hub repository even if it is not pinned.

        Raises:
            UserError: the commit is not pinned and cannot be found.
        """
        commit = self.commit()
        return super().settings() | ({} if commit is None else {"revision": commit})

    def model_identity(self) -> dict[str, Any]:
        """Return the sha256 of local weights or the version of the package with the weights."""
        path = self.weights_path
        if path is not None:
            if not path.exists():
                raise UserError(
                    f"weights = {str(path)!r}: no such file or folder; put the weights there or correct the path"
                )
            return {"weights_sha256": digest_of(path, self.runs_own_code)}
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
    """Settings of a model that may include its own code."""

    trust_remote_code: bool = Field(
        False, description="Run the code that is part of this model. Read it first. Needs revision or weights."
    )

    @model_validator(mode="after")
    def _code_is_pinned(self) -> "CodeSpec":
        if self.trust_remote_code and not (self.revision or self.weights):
            raise ValueError(
                "trust_remote_code runs code of the model's repository: set revision to the commit whose code "
                "you have read, or weights to a local folder"
            )
        return self

    @property
    def runs_own_code(self) -> bool:
        """Whether code that comes with the weights may run; its digest is then part of the identity."""
        return self.trust_remote_code
