"""Versions of what a job runs: its stage, and the model, backend or source that the configuration selects for it."""

from typing import Any

from cm3.common.stages import STAGES


def version_of(stage: str, **parts: Any) -> str:
    """Return the version of a stage and its parts as one string, such as "extract 1, timm 1".

    Args:
        stage: a key of `cm3.common.stages.STAGES`.
        parts: part name in the registry -> its specification; a name with hyphens is passed as `**{"bpr-mf": spec}`.
    """
    versions = {stage: STAGES[stage].version} | {name: part_version(spec) for name, spec in parts.items()}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def part_version(spec: Any) -> str:
    """Return the version of a model, backend or source."""
    return "1"
