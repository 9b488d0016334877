"""The pip and the conda route install the same versions, and no file names a registry."""

import re
import subprocess
import tomllib

import yaml
from packaging.requirements import Requirement
from repository import ROOT


def pins(name: str) -> dict[str, set[str]]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return by_name(line for line in lines if line and not line.startswith("-r"))


def by_name(lines) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in lines:
        requirement = Requirement(line)
        found.setdefault(requirement.name.lower().replace("_", "-"), set()).add(str(requirement.specifier))
    return found


def test_every_direct_requirement_is_pinned_exactly():
    for file in ("requirements.txt", "requirements-dev.txt"):
        for name, versions in pins(file).items():
            assert all(re.fullmatch(r"==[^,*]+", version) for version in versions), f"{file}: {name} {versions}"


def test_direct_pins_are_those_of_the_constraints():
    constraints = pins("constraints.txt")
    for file in ("requirements.txt", "requirements-dev.txt"):
        for name, versions in pins(file).items():
            assert constraints[name] == versions, f"{file}: {name}"


def test_conda_users_get_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    conda, constraints = by_name(pip), pins("constraints.txt")
    assert pins("requirements.txt").keys() <= conda.keys()
    assert conda == {name: constraints[name] for name in conda}


def test_no_tracked_file_names_a_registry():
    pattern = "|".join(
        ["files[.]python" + "hosted", "pypi" + "[.]org", "download[.]pytorch" + "[.]org", "index" + "-url"]
    )
    found = subprocess.run(["git", "grep", "-nIE", pattern], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode in (1, 128), found.stdout


def test_pins_are_in_the_ranges_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    files = {
        "requirements.txt": [*project["dependencies"], *extras["extract"], *extras["reports"], *extras["workflow"]],
        "requirements-cluster.txt": extras["cluster"],
        "requirements-dev.txt": extras["dev"],
    }
    for file, listed in files.items():
        ranges = {one.name.lower().replace("_", "-"): one.specifier for one in map(Requirement, listed)}
        ranges.pop(project["name"], None)
        direct = {name: version.removeprefix("==") for name, (version,) in pins(file).items()}
        assert direct.keys() == ranges.keys(), file
        assert not [name for name, version in direct.items() if version not in ranges[name]], file
