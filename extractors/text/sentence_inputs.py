"""Inputs of a sentence-transformers model, made of kept token ids where they are equal to those that the library makes."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from extractors.text.tokens import TokenIds

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_PROBES = ["Red shoe", " two\n WORDS  ", "größe: 28 cm (¿é?) <b> 🙂", "blue"]


class SentenceInputs:
    """Inputs of a model for a batch of texts.

    Attributes:
        token_ids: the tokens of texts.
        prompt: text before each text.
        example: inputs of some texts; entries that are no tensors are those of all batches.
    """

    def __init__(self, token_ids: TokenIds, prompt: str, example: dict[str, Any]) -> None:
        self.token_ids, self.prompt, self.example = token_ids, prompt, example

    def of(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return the model's inputs for texts, given without the prompt: tensors on the host, and other entries.

        Raises:
            KeyError: the model has other inputs than tokens, their mask and their types.
        """
        import torch

        ids, mask = self.token_ids.batch([self.prompt + text for text in texts])
        made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return {name: made[name] if isinstance(value, torch.Tensor) else value for name, value in self.example.items()}


def own_inputs(
    model: "SentenceTransformer", token_ids: TokenIds, prompt: str, marked: Callable[[Sequence[str]], list[Any]]
) -> SentenceInputs | None:
    """Return the inputs of a model's batches; None if the library makes other ones of some texts.

    Other ones are those of models that put texts into a chat, pad to a fixed length or pack a batch into one row.

    Args:
        model: a loaded model.
        token_ids: of its tokenizer.
        prompt: text before each text.
        marked: how texts are passed to the model.
    """
    batches = [["a"], [*_PROBES, "a " * (token_ids.limit + 8)]]
    try:
        if not all(count > token_ids.limit for count in token_ids.count([prompt + batches[-1][-1]])):
            return None
        inputs = SentenceInputs(token_ids, prompt, dict(model.preprocess(marked(["a"]), prompt=prompt)))
        if inputs.example["modality"] != "text":
            return None
        alike = all(_equal(inputs.of(one), dict(model.preprocess(marked(one), prompt=prompt))) for one in batches)
        return inputs if alike else None
    except MemoryError:
        raise
    except Exception:  # modules of any kind, which `encode` may yet support
        return None
    finally:
        token_ids.clear()


def _equal(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    import torch

    return found.keys() == expected.keys() and all(
        torch.equal(one, found[name]) and one.dtype == found[name].dtype
        if isinstance(one, torch.Tensor)
        else bool(one == found[name])
        for name, one in expected.items()
    )
