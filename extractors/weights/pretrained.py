"""Load models, tokenizers and processors from a folder with transformers: complete, of the right kind, without running
code that the config does not trust."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from cm3.common.device import is_out_of_memory
from cm3.common.errors import UserError
from extractors.runtime.precision import torch_dtype
from extractors.weights.completeness import check_checkpoint, check_loading_info
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
    """Return the model in a folder, on the CPU, in evaluation mode, with every used weight from its checkpoint.

    Args:
        auto: a class of transformers with from_pretrained, such as AutoModel.
        spec: precision, and whether code that the model brings may run.
        folder: config.json and weights.
        kind: kind of model, for error messages.
        unused: modules, such as "pooler.", that the caller does not use: their weights may be missing.
        options: further arguments of from_pretrained.

    Raises:
        UserError: the folder holds another kind of model, weights are missing, or loading would run code that is not trusted.
    """
    check_code(spec, folder)
    without_bars()
    with quiet("transformers"):
        found = loaded(
            lambda: auto.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=spec.runs_own_code,
                weights_only=True,
                dtype=torch_dtype(spec.precision),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            ),
            kind,
            spec,
            folder,
        )
        if isinstance(found, tuple):
            model, info = found
            check_loading_info(model, info, kind, folder, unused)
        else:  # a model with a from_pretrained of its own, which returns the model alone
            model = found
            loaded(lambda: check_checkpoint([model], kind, folder, unused), kind, spec, folder)
    return model.eval()


def load_part(auto: Any, spec: ModelSpec, folder: Path, kind: str, **options: Any) -> Any:
    """Return a tokenizer or a processor from a folder.

    Raises:
        UserError: the folder has none, or loading it would run code that is not trusted.
    """
    check_code(spec, folder)
    return loaded(
        lambda: auto.from_pretrained(folder, local_files_only=True, trust_remote_code=spec.runs_own_code, **options),
        kind,
        spec,
        folder,
    )


def on_device(model: T, device: str, kind: str, spec: ModelSpec, folder: Path, **options: Any) -> T:
    """Return a model of torch after `model.to(device, **options)`.

    Raises:
        UserError: it does not fit into the device's memory.
    """
    moved: T = loaded(lambda: cast(Any, model).to(device, **options), kind, spec, folder)
    return moved


def loaded(load: Callable[[], T], kind: str, spec: ModelSpec, folder: Path) -> T:
    """Return load(), which loads a model with a library's own function.

    Raises:
        UserError: loading fails; names code that the model includes, or the library's reason.
    """
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # libraries raise errors of any type on invalid folders
        if is_out_of_memory(error):
            raise UserError(
                f"{folder}: memory ran out while the model was loaded. Take a smaller model, precision: bfloat16, "
                "or a machine with more memory"
            ) from error
        raise _refusal(kind, spec, folder, error) from error


def check_code(spec: ModelSpec, folder: Path) -> None:
    """Check that the code of a trusted model is in its folder.

    Raises:
        UserError: the code is in another repository, whose revision is not pinned.
    """
    for reference in own_code(folder) if spec.runs_own_code else ():
        repository, _, name = reference.rpartition("--")
        if repository:
            raise UserError(
                f"{folder}: its code {name} comes from the repository {repository}, whose revision is not pinned; "
                f"download that code into a copy of the folder, name it without '{repository}--' in the folder's "
                "JSON files, and set weights to the copy"
            )


def own_code(folder: Path) -> list[str]:
    """Return the classes named in a model's JSON files that are not part of the libraries: code that it includes."""
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
    code = [] if spec.runs_own_code else own_code(folder)
    if code:
        trust = (
            "Read it, then set trust_remote_code: true in this extractor's section, with revision or weights; or take"
            if isinstance(spec, CodeSpec)
            else "Take"
        )
        return UserError(
            f"{folder}: the model includes its own code ({', '.join(sorted(set(code))[:3])}), which is not run. "
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
