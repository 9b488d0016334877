"""Models of transformers with random weights, a few kilobytes each, saved as folders that from_pretrained loads."""

from pathlib import Path
from typing import Any

import tiny_vlm
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ("red", "blue", "shoe", "bag", "pan", "a", "the", "for", "women", "query", ":", "word", "long")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SIDE, PATCH = 32, 8
GEMMA_DIM = 24
_WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_VISION = _WIDTHS | {"image_size": SIDE, "patch_size": PATCH}


def tokenizer(side: str = "right", limit: int = 64, **special: str) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of whole words that puts [CLS] before and [SEP] behind a text, with further special tokens."""
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
        model_max_length=limit,
        extra_special_tokens=special,
    )


def text_models() -> dict[str, transformers.PreTrainedConfig]:
    """Return a config of each kind: an encoder, one whose positions start behind the padding, two decoders, a T5, and the
    encoders of jina-embeddings-v3 and EmbeddingGemma, with rotary positions.
    """
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
        "jina-v3": transformers.JinaEmbeddingsV3Config(
            **_WIDTHS, **size, bos_token_id=2, eos_token_id=3, max_position_embeddings=64
        ),
        "embeddinggemma": transformers.Gemma3TextConfig(
            **_WIDTHS,
            **size,
            bos_token_id=2,
            eos_token_id=3,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            sliding_window=8,
            use_bidirectional_attention=True,
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
        "siglip2-naflex": transformers.Siglip2Config(
            text_config=text, vision_config=_WIDTHS | {"patch_size": PATCH, "num_patches": 16}
        ),
        "dinov3": transformers.DINOv3ViTConfig(**_VISION, num_register_tokens=4, pos_embed_rescale=None),
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
    if kind == "siglip2-naflex":
        transformers.Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=14).save_pretrained(folder)
        return folder
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    transformers.CLIPImageProcessor(**size, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.2]).save_pretrained(
        folder
    )
    return folder


def embedders() -> dict[str, tuple[transformers.PreTrainedModel, Any]]:
    """Return a multimodal embedder of each kind with its processor: two vision-language models, and two dual encoders.

    The tokenizer of the vision-language model has no limit, and its positions are in the nested config of the text.
    """
    torch.manual_seed(0)
    processor, _ = tiny_vlm.build()
    words = processor.tokenizer
    number = words.convert_tokens_to_ids
    text = _WIDTHS | {
        "vocab_size": len(words),
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "pad_token_id": number("<|endoftext|>"),
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    config = transformers.Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    chat = transformers.Qwen3VLProcessor(
        tokenizer=words,
        image_processor=transformers.Qwen2VLImageProcessor(
            patch_size=16, size={"shortest_edge": 32**2, "longest_edge": 16 * 32**2}
        ),
        video_processor=transformers.Qwen3VLVideoProcessor(),
        chat_template=tiny_vlm.TEMPLATE,
    )
    side = {"height": SIDE, "width": SIDE}
    clip = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=side)
    dual = {
        "clip": transformers.CLIPProcessor(image_processor=clip, tokenizer=tokenizer()),
        "siglip": transformers.SiglipProcessor(
            image_processor=transformers.SiglipImageProcessor(size=side), tokenizer=tokenizer()
        ),
    }
    return {"qwen3-vl": (transformers.Qwen3VLModel(config), chat), "embeddinggemma2": _embedding_gemma2()} | {
        kind: (transformers.AutoModel.from_config(vision_models()[kind]), one) for kind, one in dual.items()
    }


def _embedding_gemma2() -> tuple[transformers.PreTrainedModel, Any]:
    """Return an EmbeddingGemma 2, which projects its states to vectors of another width, with its processor."""
    kinds = ("image", "boi", "eoi", "audio", "boa", "eoa")
    words = tokenizer(limit=512, **{f"{kind}_token": f"<{kind}>" for kind in kinds})
    number = {kind: words.convert_tokens_to_ids(f"<{kind}>") for kind in kinds}
    text = _WIDTHS | {
        "vocab_size": len(words) + 1,  # the processor adds the token of videos
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "max_position_embeddings": 512,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "hidden_size_per_layer_input": 8,
        "embedding_dim": GEMMA_DIM,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    vision = transformers.Gemma4VisionConfig(
        **_WIDTHS, num_key_value_heads=4, head_dim=8, patch_size=PATCH, position_embedding_size=64
    )
    config = transformers.EmbeddingGemma2Config(
        text_config=text,
        vision_config=vision,
        image_token_id=number["image"],
        video_token_id=len(words),
        audio_token_id=number["audio"],
        boi_token_id=number["boi"],
        eoi_token_id=number["eoi"],
        boa_token_id=number["boa"],
        eoa_token_index=number["eoa"],
    )
    config.audio_config = None
    processor = transformers.EmbeddingGemma2Processor(
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(),
        image_processor=transformers.Gemma4ImageProcessor(patch_size=PATCH, max_soft_tokens=70),
        tokenizer=words,
        video_processor=transformers.EmbeddingGemma2VideoProcessor(),
        image_seq_length=70,
        chat_template="{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %} "
        "{{ c.text }} {% endif %}{% endfor %}{% endfor %}",
    )
    return transformers.AutoModel.from_config(config), processor


def save_embedder(kind: str, folder: Path) -> Path:
    """Save a multimodal embedder as a model of sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    model, processor = embedders()[kind]
    _shake(model)
    bare = folder / "bare"
    model.save_pretrained(bare)
    processor.save_pretrained(bare)
    body = Transformer(str(bare))
    pooled = {"qwen3-vl": [Pooling(32, "lasttoken")], "embeddinggemma2": [Pooling(GEMMA_DIM, "mean")]}.get(kind, [])
    SentenceTransformer(modules=[body, *pooled], device="cpu").save(str(folder / "model"), create_model_card=False)
    return folder / "model"


def _shake(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
