"""One job of a stage: its settings, its version, and the identity by which Snakemake judges its outputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cm3.common.keys import key_of
from cm3.common.parts import Part
from cm3.common.stages import STAGES


@dataclass(frozen=True)
class Task:
    """The arguments of one job of a stage, and the identity that decides whether its outputs are up to date.

    Attributes:
        stage: a key of `cm3.common.stages.STAGES`.
        spec: the stage's settings.
        parts: the models, backends, sources or metrics that the job runs, by name.
        runtime: settings that change speed or location only; a change of them reruns nothing.
        decides: what determines the output in place of `spec`, where the spec holds more than that.
        versioned: False if the outputs do not depend on the version of the stage.
        earlier: `made_from` of the stage before this one, for outputs whose paths do not hold a key of their settings.
    """

    stage: str
    spec: dict[str, Any]
    parts: Mapping[str, Part | type[Part]] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    decides: Any = None
    versioned: bool = True
    earlier: Mapping[str, str] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """The version of the stage and of each part, such as "train-baseline 1, lightgcn 1"."""
        versions = {self.stage: str(STAGES[self.stage].version)}
        versions |= {name: part.code_version() for name, part in self.parts.items()}
        return ", ".join(f"{name} {version}" for name, version in versions.items())

    @property
    def libraries(self) -> list[str]:
        """Names of the libraries that the outputs of the parts depend on."""
        return sorted({library for part in self.parts.values() for library in part.libraries})

    @property
    def settings(self) -> str:
        """The key of what determines the output."""
        return key_of(self.spec if self.decides is None else self.decides)

    @property
    def made_from(self) -> dict[str, str]:
        """The keys of the settings of this stage and of those before it, by stage."""
        return {**self.earlier, self.stage: self.settings}

    @property
    def identity(self) -> str:
        """The one parameter that Snakemake records and compares: short, because it prints it as the reason of a rerun."""
        return f"settings {self.settings}, version {self.version if self.versioned else 'any'}"
