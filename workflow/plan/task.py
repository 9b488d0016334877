"""One job of a stage: its settings, its version, and the identity by which Snakemake judges its outputs."""

from dataclasses import dataclass, field
from typing import Any

from cm3.common.keys import key_of


@dataclass(frozen=True)
class Task:
    """The arguments of one job of a stage, and the identity that decides whether its outputs are up to date.

    Attributes:
        spec: the stage's settings.
        version: of the stage and its parts, such as "train-baseline 1, lightgcn 1".
        runtime: settings that change speed or location only; a change of them reruns nothing.
        decides: what determines the output in place of `spec`, where the spec holds more than that.
    """

    spec: dict[str, Any]
    version: str
    runtime: dict[str, Any] = field(default_factory=dict)
    decides: Any = None

    @property
    def identity(self) -> str:
        """The one parameter that Snakemake records and compares: short, because it prints it as the reason of a rerun."""
        return f"settings {key_of(self.spec if self.decides is None else self.decides)}, version {self.version}"
