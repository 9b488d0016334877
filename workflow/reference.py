"""Reference of all config keys, generated from the pydantic models: Markdown tables and a JSON Schema for editors.

`python -m workflow.reference` updates config/README.md and workflow/schemas/config.schema.json.
"""

import json
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from cm3.common.strict import Strict
from cm3.config import Evaluation, Training
from cm3.datasets.registry import source_specs
from cm3.datasets.spec import SourceSpec
from cm3.model_registry import DEFAULT_MODEL
from cm3.model_registry import spec_classes as model_specs
from cm3.model_spec import ModelSpec
from extractors.registry import spec_classes
from workflow.plan.experiments import ExperimentSection
from workflow.plan.studies import StudySection

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "config/README.md"
SCHEMA = ROOT / "workflow/schemas/config.schema.json"
SETTINGS: dict[str, type[Strict]] = {"training": Training, "evaluation": Evaluation}
BEGIN, END = "<!-- written by python -m workflow.reference; edit the models, not this part -->", "<!-- end -->"


def tables() -> str:
    """Return the Markdown tables of all keys, section by section."""
    sections = ["## datasets", "", "Every dataset has these:", "", *_table(SourceSpec, skip={"source"})]
    shared = set(SourceSpec.model_fields)
    for name, source in source_specs().items():
        sections += ["", f"### source: {name}", "", _first_line(source), "", *_table(source, skip=shared - {"images"})]
    sections += ["", "## extractors"]
    for name, spec in spec_classes().items():
        sections += ["", f"### backend: {name}", "", _first_line(spec), "", *_table(spec)]
    sections += ["", "## experiments", "", *_table(ExperimentSection)]
    for name, model in model_specs().items():
        sections += ["", f"### model, name: {name}", "", _first_line(model), _facts(name, model), *_rows(model)]
    for title, section in SETTINGS.items():
        sections += ["", f"### {title}", "", _first_line(section), "", *_table(section)]
    sections += ["", "## studies", "", *_table(StudySection)]
    return "\n".join(sections)


def _facts(name: str, model: type[ModelSpec]) -> str:
    """Return what a user must know of a model besides its settings, in sentences."""
    default = "The default model. " if name == DEFAULT_MODEL else ""
    modalities = "It needs modalities" if model.reads_features else "It accepts no modalities"
    fitted = "is trained" if model.trains else "is computed in closed form"
    changed = ", ".join(f"`{key}` {value}" for key, value in model.training_defaults.items())
    defaults = f" Defaults of `training` that differ: {changed}." if changed else ""
    return f"{default}{modalities} and {fitted}.{defaults}"


def _rows(model: type[Strict]) -> list[str]:
    keys = model.model_fields.keys() - {"name"}
    return ["", *_table(model, skip={"name"})] if keys else []


def _first_line(model: type[Strict]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def _table(model: type[Strict], prefix: str = "", skip: set[str] | frozenset[str] = frozenset()) -> list[str]:
    rows = [] if prefix else ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        nested = _nested(field)
        if nested is not None:
            default = "required" if field.is_required() else ""
            rows.append(f"| `{prefix}{name}` | section | {default} | {field.description or _first_line(nested)} |")
            rows += _table(nested, f"{prefix}{name}.")
        else:
            marks = " *" if name in model.runtime_fields else ""
            kind = _type_name(field.annotation).replace("|", "\\|")
            rows.append(f"| `{prefix}{name}`{marks} | {kind} | {_default(field)} | {field.description or ''} |")
    return rows


def _nested(field: FieldInfo) -> type[Strict] | None:
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Strict):
            return candidate
    return None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    text = json.dumps(value, ensure_ascii=False)
    return f"`{text}`" if len(text) <= 60 else "see the model"


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return ", ".join(str(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is types.NoneType else _type_name(a) for a in arguments)
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"{_type_name(arguments[0])} -> {_type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return "section"
    names = {int: "integer", float: "number", str: "text", bool: "true, false", Any: "any", typing.Any: "any"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def schema() -> dict[str, Any]:
    """Return the JSON Schema of config.yaml, for editors that complete and check YAML."""
    datasets: Any = Annotated[Union[tuple(source_specs().values())], Field(discriminator="source")]  # noqa: UP007
    extractors: Any = Union[tuple(spec_classes().values())]  # noqa: UP007
    models: Any = Union[tuple(model_specs().values())]  # noqa: UP007
    settings: Any = {name: (model, Field(default_factory=model)) for name, model in SETTINGS.items()}
    default: Any = model_specs()[DEFAULT_MODEL]
    settings["model"] = (models, Field(default_factory=default))
    settings["dataset"] = (str, Field("", description="a name under datasets; required unless like gives it"))
    experiment: Any = create_model("Experiment", __base__=ExperimentSection, **settings)
    parts = {"datasets": datasets, "extractors": extractors, "experiments": experiment}
    sections: Any = {name: (dict.__class_getitem__((str, part)), ...) for name, part in parts.items()}
    sections["studies"] = (dict[str, StudySection], Field(default_factory=dict))
    whole = create_model("Config", __base__=Strict, **sections)
    return whole.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}


def main() -> None:
    """Update both files."""
    text = README.read_text(encoding="utf-8")
    body = re.sub(
        re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: f"{BEGIN}\n\n{tables()}\n\n{END}", text, flags=re.S
    )
    README.write_text(body, encoding="utf-8")
    SCHEMA.parent.mkdir(exist_ok=True)
    SCHEMA.write_text(json.dumps(schema(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
