"""Golden outputs: what a stage or part gave for a small input, by version.

An output that changed under an unchanged version is a failure: existing results would silently be out of date. After a
change that is meant, raise the version of the stage (`cm3/common/stages.py`) or part, then renew the file with

    CM3_UPDATE_GOLDEN=1 ./run test tests/...
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def summary(array: Any) -> dict[str, Any]:
    """Return an array of numbers as shape, type, moments and a few projections on fixed directions.

    A few numbers, compared with a tolerance, so that another CPU or library version passes and another formula does not.
    """
    values = np.asarray(array)
    flat = values.astype(np.float64).reshape(-1)
    directions = np.random.Generator(np.random.PCG64(7)).standard_normal((4, flat.size))
    scale = float(np.linalg.norm(flat)) or 1.0
    return {
        "shape": list(values.shape),
        "dtype": str(values.dtype),
        "mean": float(flat.mean()) if flat.size else 0.0,
        "norm": float(np.linalg.norm(flat)),
        "projections": [float(x) for x in directions @ flat / scale],
    }


def digest(value: Any) -> str:
    """Return 16 hex digits over a JSON value, for outputs that are equal to the last digit everywhere."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_golden(name: str, version: int | None, outputs: dict[str, Any], tolerance: float = 1e-3) -> None:
    """Compare `outputs` (JSON values; numbers with `tolerance`, relative to 1 or their size) with `tests/golden/NAME.json`."""
    assert version is not None, f"{name}: a part in the repository has a version"
    path = GOLDEN / f"{name}.json"
    outputs = json.loads(json.dumps(outputs))
    if os.environ.get("CM3_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": version, "outputs": outputs}, indent=1) + "\n")
    assert path.exists(), f"{path} is missing; make it with CM3_UPDATE_GOLDEN=1"
    golden = json.loads(path.read_text())
    different = list(_differences(golden["outputs"], outputs, tolerance, name))
    if golden["version"] == version:
        hint = "if the change is meant, raise the version and renew the file with CM3_UPDATE_GOLDEN=1"
        assert not different, f"{name} gives other outputs under version {version}; {hint}:\n" + "\n".join(different)
    else:
        raise AssertionError(
            f"{path} is of version {golden['version']}, the code of {version}; renew it with CM3_UPDATE_GOLDEN=1"
        )


def _differences(old: Any, new: Any, tolerance: float, path: str) -> "Any":
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key not in old or key not in new:
                yield f"{path}.{key}: only in the {'golden' if key in old else 'new'} outputs"
            else:
                yield from _differences(old[key], new[key], tolerance, f"{path}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, tolerance, f"{path}[{number}]")
    elif isinstance(old, float) and isinstance(new, int | float):
        if not abs(old - new) <= tolerance * max(1.0, abs(old)):
            yield f"{path}: {old} is now {new}"
    elif old != new:
        yield f"{path}: {old!r} is now {new!r}"
