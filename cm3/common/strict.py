"""The base of every config model: frozen, strict types, unknown keys rejected with the nearest valid name."""

import difflib
import re
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cm3.common.errors import UserError
from cm3.common.http import hide_secrets

_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def _scientific_to_float(value: Any) -> Any:
    # YAML 1.1 reads `1e-3` (no dot) as a string; to a user it is a number.
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


Float = Annotated[float, BeforeValidator(_scientific_to_float), Field(allow_inf_nan=False)]
"""A finite float that also accepts YAML's `1e-3`."""


class Strict(BaseModel):
    """A frozen config section. Subclasses list in `runtime_fields` the fields that change speed and not the output."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, protected_namespaces=())

    runtime_fields: ClassVar[frozenset[str]] = frozenset()

    def identity(self) -> dict[str, Any]:
        """Return the fields that change the output, as JSON types, from which keys are computed."""
        return self.model_dump(mode="json", exclude=set(self.runtime_fields))

    def runtime(self) -> dict[str, Any]:
        """Return the fields that change speed or location only (batch size, device, workers)."""
        return self.model_dump(mode="json", include=set(self.runtime_fields))


def nearest(name: str, valid: Any) -> str:
    """Return " (did you mean 'x'?)" with the closest of `valid`, or the list of all when none is close."""
    names = [str(v) for v in valid]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (valid: {', '.join(sorted(names))})" if names else ""


Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], data: Any, where: str) -> Model:
    """Return `data` as `model`; `where` is the key path in front of each message.

    Raises:
        UserError: one line per fault with the key's path, the value and what is expected.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults: dict[str, list[str]] = {}
        for one in error.errors():
            told, expected = _explain(one, model, where, _keys(one, data))
            faults.setdefault(told, []).append(expected)
        raise UserError("\n".join(told + _alternatives(expected) for told, expected in faults.items())) from None


def _keys(error: Any, data: Any) -> list[Any]:
    """Return the keys of an error's place without the alternatives of a union, which pydantic names among them."""
    keys, value, last = [], data, len(error["loc"]) - 1
    for place, part in enumerate(error["loc"]):
        whole = place == last and error["type"] != "missing" and error["input"] is value
        held = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if held and not whole:
            keys.append(part)
            value = value[part]
        elif isinstance(value, dict) and place == last and not whole:  # a key that is missing, or the default of one
            keys.append(part)
    return keys


def _explain(error: Any, model: type[BaseModel], where: str, keys: list[Any]) -> tuple[str, str]:
    """Return the place and the value of an error, and what is expected there."""
    path = ".".join([where, *map(str, keys)]).strip(".")
    if error["type"] == "extra_forbidden":
        return f"{path}: ", f"unknown key{nearest(keys[-1], _fields_at(model, tuple(keys[:-1])))}"
    if error["type"] == "missing":
        return f"{path}: ", "required, but not given"
    return f"{path} = {hide_secrets(repr(error['input']))}: ", error["msg"].removeprefix("Value error, ")


def _alternatives(expected: list[str]) -> str:
    first, *others = dict.fromkeys(expected)
    return " or ".join([first, *(text.removeprefix("Input should be ") for text in others)])


def _fields_at(model: Any, path: tuple[Any, ...]) -> list[str]:
    for part in path:
        if get_origin(model) is dict:
            annotation = get_args(model)[1]
        else:
            field = getattr(model, "model_fields", {}).get(part)
            annotation = field and field.annotation
        candidates = (annotation, *get_args(annotation))
        model = next((c for c in candidates if hasattr(c, "model_fields") or get_origin(c) is dict), None)
    return list(getattr(model, "model_fields", {}))
