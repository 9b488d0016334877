"""A Qwen2.5-VL of under 1 MB, built and fitted offline in seconds, that says which colour an image has."""

from pathlib import Path

import numpy as np
import torch
import transformers
from fixtures_extractors import COLOURS
from PIL import Image
from tokenizers import pre_tokenizers

QUESTION = "What is it?"
CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
_WIDTH = 64


def answer(colour: str) -> str:
    """Return what the fitted model says about an image of this colour."""
    return f"a {colour} product"


def build(scale: int = 1) -> tuple[transformers.ProcessorMixin, transformers.PreTrainedModel]:
    """Return a processor with a byte tokenizer plus the answers' words, and a model with random weights, `scale` times as wide."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=letters, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL)})
    tokenizer.add_tokens([f" {word}" for word in ("a", "product", *COLOURS)])
    processor = transformers.Qwen2_5_VLProcessor(
        tokenizer=tokenizer,
        image_processor=transformers.Qwen2VLImageProcessor(size={"shortest_edge": 28**2, "longest_edge": 16 * 28**2}),
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )
    number = dict(zip(CONTROL, tokenizer.convert_tokens_to_ids(list(CONTROL)), strict=True))
    ends = {
        "bos_token_id": number["<|endoftext|>"],
        "pad_token_id": number["<|endoftext|>"],
        "eos_token_id": number["<|im_end|>"],
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": _WIDTH * scale,
        "intermediate_size": 2 * _WIDTH * scale,
        "num_hidden_layers": 2,
        "num_attention_heads": 4 * scale,
        "num_key_value_heads": 2 * scale,
        # Half of a head's 16 numbers, shared among time, height and width.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 32 * scale,
        "intermediate_size": 64 * scale,
        "num_heads": 2 * scale,
        "out_hidden_size": _WIDTH * scale,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=text | ends,
            vision_config=vision,
            image_token_id=number["<|image_pad|>"],
            video_token_id=number["<|video_pad|>"],
            vision_start_token_id=number["<|vision_start|>"],
            vision_end_token_id=number["<|vision_end|>"],
        )
    )
    model.generation_config = transformers.GenerationConfig(do_sample=False, **ends)
    return processor, model


def fit(processor: transformers.ProcessorMixin, model: transformers.PreTrainedModel, steps: int) -> float:
    """Teach the model to answer with the colour of noisy one-colour images, whatever is asked; return the loss."""
    random = np.random.default_rng(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    length = len(processor.tokenizer(f" {answer('red')}<|im_end|>")["input_ids"])
    loss = torch.tensor(float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small is faster so
    model.train()
    for _ in range(steps):
        colours = random.choice(list(COLOURS), 12)
        # Questions of other lengths, so that the padding in front is nothing new.
        asked = [QUESTION + "".join(random.choice(list(" abc<|>"), random.integers(0, 24))) for _ in colours]
        images = [
            Image.fromarray(np.clip(COLOURS[one] + random.normal(0, 12, (56, 56, 3)), 0, 255).astype(np.uint8))
            for one in colours
        ]
        texts = [
            f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n"
            f"<|im_start|>assistant\n {answer(colour)}<|im_end|>"
            for question, colour in zip(asked, colours, strict=True)
        ]
        processor.tokenizer.padding_side = "left"
        batch = processor(text=texts, images=[[one] for one in images], return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        labels[:, :-length] = -100
        loss = model(**batch, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.eval()
    torch.set_num_threads(threads)
    return loss.item()


def save_fitted(folder: Path, steps: int = 100) -> Path:
    """Build, fit and save the model as a folder that from_pretrained loads."""
    processor, model = build()
    loss = fit(processor, model, steps)
    assert loss < 0.2, f"the tiny model did not learn its colours: loss {loss:.3f}"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
