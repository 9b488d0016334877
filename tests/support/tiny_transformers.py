"""Models of transformers with random weights, a few kilobytes each, saved as folders that from_pretrained loads."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ("red", "blue", "shoe", "bag", "pan", "a", "the", "for", "women", "query", ":", "word", "long")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SIDE, PATCH = 32, 8
_WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_VISION = _WIDTHS | {"image_size": SIDE, "patch_size": PATCH}


def tokenizer(side: str = "right") -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of whole words that puts [CLS] before and [SEP] behind a text."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        padding_side=side,
        model_max_length=64,
    )


def text_models() -> dict[str, transformers.PreTrainedConfig]:
    """Return a config of each kind: an encoder, one whose positions start behind the padding, two decoders, a T5."""
    size: dict[str, Any] = {"vocab_size": len(SPECIAL) + len(WORDS), "pad_token_id": 0}
    return {
        "bert": transformers.BertConfig(**_WIDTHS, **size, max_position_embeddings=48),
        "roberta": transformers.RobertaConfig(**_WIDTHS, **size, max_position_embeddings=41),
        "qwen": transformers.Qwen3Config(
            **_WIDTHS, **size, num_key_value_heads=2, head_dim=8, max_position_embeddings=64
        ),
        "gpt2": transformers.GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            vocab_size=size["vocab_size"],
            bos_token_id=3,
            eos_token_id=3,
        ),
        "t5": transformers.T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, **size
        ),
    }


def save_text(kind: str, folder: Path, side: str = "right") -> Path:
    """Save a text model of `text_models` with its tokenizer."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(text_models()[kind])
    # Freshly made ones have biases of 0 and norms of 1: what forgets them would not show.
    _shake(model)
    model.save_pretrained(folder)
    tokenizer(side).save_pretrained(folder)
    return folder


def vision_models() -> dict[str, transformers.PreTrainedConfig]:
    """Return a config of each kind: two dual encoders, image towers with and without class tokens, a convolution."""
    text = _WIDTHS | {"vocab_size": 32, "max_position_embeddings": 8}
    return {
        "clip": transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16),
        "siglip": transformers.SiglipConfig(text_config=text, vision_config=_VISION),
        "clip-tower": transformers.CLIPVisionConfig(**_VISION, projection_dim=16),
        "dinov2": transformers.Dinov2Config(**_VISION),
        "dinov2-registers": transformers.Dinov2WithRegistersConfig(**_VISION, num_register_tokens=3),
        "vit": transformers.ViTConfig(**_VISION),
        "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    }


def save_vision(kind: str, folder: Path, model: type | None = None) -> Path:
    """Save a vision model of `vision_models` with its preprocessing: CLIP's, of a small side."""
    torch.manual_seed(0)
    config = vision_models()[kind]
    made = transformers.AutoModel.from_config(config) if model is None else model(config)
    _shake(made)
    made.save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    transformers.CLIPImageProcessor(**size, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.2]).save_pretrained(
        folder
    )
    return folder


def _shake(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
