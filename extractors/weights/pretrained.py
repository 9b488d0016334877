"""Models, tokenizers and processors out of a folder, through transformers: whole, of the right kind, running no code
but what the config trusts."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from cm3.common.errors import UserError
from extractors.runtime.device import is_out_of_memory, torch_dtype
from extractors.weights.hub import quiet, without_bars
from extractors.weights.spec import CodeSpec, ModelSpec

T = TypeVar("T")

_CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
)


def load_model(auto: Any, spec: ModelSpec, folder: Path, kind: str, unused: Sequence[str] = (), **options: Any) -> Any:
    """Return the model in a folder, ready on the processor, every weight that is used found in the checkpoint.

    Args:
        auto: a class of transformers with from_pretrained, such as AutoModel.
        spec: its precision, and whether code that the model brings may run.
        folder: config.json and weights.
        kind: what error messages call it.
        unused: modules, such as "pooler.", that the caller makes no use of, so that their weights may be missing.
        options: further arguments of from_pretrained.

    Raises:
        UserError: the folder holds something else, weights are missing, or code would have to run that is not trusted.
    """
    check_code(spec, folder)
    with whole_models(kind, folder, unused):
        model = loaded(
            lambda: auto.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=spec.brings_code,
                weights_only=True,
                dtype=torch_dtype(spec.precision),
                **options,
            ),
            kind,
            spec,
            folder,
        )
    return model.eval()


@contextlib.contextmanager
def whole_models(kind: str, folder: Path, unused: Sequence[str] = ()) -> Iterator[None]:
    """Refuse models that are loaded through transformers within the block, be it by another library, with weights missing.

    Args:
        kind: what error messages call the model.
        folder: where it comes from.
        unused: modules that the caller makes no use of, so that their weights may be missing.

    Raises:
        UserError: weights are missing.
    """
    from transformers import PreTrainedModel

    base: Any = PreTrainedModel
    original = base.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, *arguments: Any, **options: Any) -> Any:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, told = original.__func__(cls, *arguments, **options)
        _check_whole(model, told, kind, folder, unused)
        return model

    # A library in between, or a model's own from_pretrained, passes on the model alone; nothing else tells which of
    # its weights are random.
    base.from_pretrained = classmethod(from_pretrained)
    without_bars()
    try:
        with quiet("transformers"):
            yield
    finally:
        base.from_pretrained = original


def _check_whole(model: Any, told: Mapping[str, Any], kind: str, folder: Path, unused: Sequence[str]) -> None:
    """Refuse a model with weights that are not in its checkpoint: transformers fills in random numbers, and warns."""
    wrong = [(name, "is not in the checkpoint") for name in sorted(told["missing_keys"])]
    wrong += [
        (name, f"has the shape {list(theirs)} in the checkpoint in place of {list(ours)}")
        for name, theirs, ours in sorted(told["mismatched_keys"])
    ]
    wrong = [(name, fault) for name, fault in wrong if not any(f".{part}" in f".{name}" for part in unused)]
    if wrong:
        name, fault = wrong[0]
        raise UserError(
            f"{folder}: not weights of {kind}: {len(wrong)} tensors of {type(model).__name__}, which its config.json "
            f"names, don't fit: {name} {fault}"
        )


def load_part(auto: Any, spec: ModelSpec, folder: Path, kind: str, **options: Any) -> Any:
    """Return a tokenizer or a processor from a folder.

    Raises:
        UserError: the folder has none, or code would have to run that is not trusted.
    """
    check_code(spec, folder)
    return loaded(
        lambda: auto.from_pretrained(folder, local_files_only=True, trust_remote_code=spec.brings_code, **options),
        kind,
        spec,
        folder,
    )


def on_device(model: T, device: str, kind: str, spec: ModelSpec, folder: Path, **options: Any) -> T:
    """Return a model of torch after `model.to(device, **options)`.

    Raises:
        UserError: it does not fit there.
    """
    return loaded(lambda: cast(Any, model).to(device, **options), kind, spec, folder)


def loaded(load: Callable[[], T], kind: str, spec: ModelSpec, folder: Path) -> T:
    """Return load(), a library's own way of making a model out of a folder.

    Raises:
        UserError: it does not load; says whether it wants to run code, and the library's own reason.
    """
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # whatever a strange folder makes a library raise
        if is_out_of_memory(error):
            raise UserError(
                f"{folder}: memory ran out while the model was loaded. Take a smaller model, precision: bfloat16, "
                "or a machine with more memory"
            ) from error
        raise _refusal(kind, spec, folder, error) from error


def check_code(spec: ModelSpec, folder: Path) -> None:
    """Look where the code of a trusted model would come from.

    Raises:
        UserError: from another repository, of which no revision is pinned.
    """
    for reference in own_code(folder) if spec.brings_code else ():
        repository, _, name = reference.rpartition("--")
        if repository:
            raise UserError(
                f"{folder}: its code {name} comes from the repository {repository}, whose revision nothing pins; "
                f"download that code into a copy of the folder, name it without '{repository}--' in the folder's "
                "JSON files, and set weights to the copy"
            )


def own_code(folder: Path) -> list[str]:
    """Return the classes that a model's JSON files name outside of the libraries: code that it brings along."""
    found: list[str] = []
    for name in _CONFIGS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); is the download complete?") from None
        if name == "modules.json":
            types = [module.get("type", "") for module in config if isinstance(module, dict)]
            found += [one for one in types if not one.startswith("sentence_transformers.")]
        elif isinstance(config, dict):
            found += _texts(config.get("auto_map"))
    return found


def _refusal(kind: str, spec: ModelSpec, folder: Path, error: Exception) -> UserError:
    code = [] if spec.brings_code else own_code(folder)
    if code:
        trust = (
            "Read it, then set trust_remote_code: true in this extractor's section, with revision or weights; or take"
            if isinstance(spec, CodeSpec)
            else "Take"
        )
        return UserError(
            f"{folder}: the model brings code of its own ({', '.join(sorted(set(code))[:3])}), which is not run. "
            f"{trust} a model that the library knows"
        )
    reason = " ".join(str(error).split())
    return UserError(f"{folder}: not {kind} that can be loaded safely: {type(error).__name__}: {reason[:500]}")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
