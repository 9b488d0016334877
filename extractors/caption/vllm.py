"""Captions from a vision-language model through vLLM in this process: an optional, faster engine."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from cm3.common.errors import UserError
from cm3.common.strict import Float
from extractors.caption.base import Answer, CaptionSpec
from extractors.caption.batches import Asked, PreparedBatch
from extractors.caption.local import KIND, BatchCaptioner, name_of, processor_of, rendered
from extractors.caption.thoughts import MarkerTokens, ends_inside_thought
from extractors.spec import Cost
from extractors.weights.hub import model_path
from extractors.weights.pretrained import loaded
from extractors.weights.spec import ModelSpec

INSTALL = "pip install vllm"
_IMAGES_AT_ONCE = 256


class VllmCaptionSpec(CaptionSpec, ModelSpec):
    """Captions through vLLM: the models of transformers-caption on a GPU, many times as fast. vLLM is an optional install."""

    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("vllm", "torch", "transformers", "tokenizers", "pillow")
    cost: ClassVar[Cost] = Cost(8000, 32000, 2)
    runtime_fields: ClassVar[frozenset[str]] = (
        CaptionSpec.runtime_fields
        | ModelSpec.runtime_fields
        | {"gpu_memory_utilization", "max_model_len", "tensor_parallel_size"}
    )

    backend: Literal["vllm-caption"] = Field(description="Caption images with vLLM on a GPU.")
    precision: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Number format of the model's arithmetic."
    )
    gpu_memory_utilization: Float = Field(0.9, gt=0, le=1, description="Fraction of the GPU's memory for vLLM.")
    max_model_len: int = Field(
        4096, gt=0, description="Maximum number of tokens of image, prompt and caption together."
    )
    tensor_parallel_size: int = Field(1, gt=0, description="Number of GPUs that share the model (tensor parallelism).")

    def gpus(self) -> int:
        """Return the number of GPUs that share the model."""
        return self.tensor_parallel_size if self.uses_gpu() else 0

    def load(self) -> "VllmCaptioner":
        """Start the engine."""
        return VllmCaptioner(self)


class VllmCaptioner(BatchCaptioner):
    """A vLLM engine that captions images greedily."""

    device = "cuda"

    def __init__(self, spec: VllmCaptionSpec) -> None:
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                f"backend vllm-caption: vLLM can't be imported ({error}). Run: {INSTALL}; if its versions of torch "
                "and transformers conflict with ours, run a vLLM server in its own environment and use openai-caption"
            ) from error
        self.spec: VllmCaptionSpec = spec
        self.version = str(getattr(vllm, "__version__", "unknown"))
        folder = model_path(spec)
        self.processor = processor_of(spec, folder)
        self.markers = MarkerTokens(self.processor.tokenizer)
        self.inside = loaded(
            lambda: ends_inside_thought(rendered(self.processor, spec, spec.prompt_of({}))), KIND, spec, folder
        )
        try:
            self.engine = vllm.LLM(
                model=str(folder),
                dtype=spec.precision,
                seed=0,
                trust_remote_code=False,
                load_format="safetensors",
                gpu_memory_utilization=spec.gpu_memory_utilization,
                max_model_len=spec.max_model_len,
                tensor_parallel_size=spec.tensor_parallel_size,
                limit_mm_per_prompt={"image": 1},
            )
        except Exception as error:  # engines raise many types, depending on the folder and the GPU
            raise UserError(f"{folder}: vLLM failed to start with this model: {error}") from error
        # Explicit parameters, so that the model's own generation config can't sample or penalise.
        self.sampling = vllm.SamplingParams(temperature=0.0, max_tokens=spec.token_limit(), seed=0)

    def facts(self) -> dict[str, Any]:
        """Return the model, vLLM's version, the prompt and the decoding in use."""
        return self.spec.facts(name_of(self.spec)) | {"vllm": self.version}

    def size(self) -> int:
        """Return the number of images to decode at a time; vLLM forms its own batches from them."""
        return self.spec.batch_size or _IMAGES_AT_ONCE

    def answer(self, batch: PreparedBatch) -> list[Answer]:
        """Return the answer to each decoded image and prompt; an input that vLLM refuses fails without its batch."""
        return self._answers(batch.asked)

    def _answers(self, asked: Sequence[Asked]) -> list[Answer]:
        try:
            return self._generate(asked)
        except ValueError as refusal:  # a prompt over max_model_len, or an image out of the model's bounds
            if len(asked) == 1:
                return [Answer("", reason=f"vLLM refused it: {refusal}")]
        return [self._answers([one])[0] for one in asked]

    def _generate(self, asked: Sequence[Asked]) -> list[Answer]:
        prompts = [
            {
                # vLLM replaces the template's placeholder by the image's tokens. It searches for the placeholder's
                # text, which `replace_brackets` removes from prompts.
                "prompt": rendered(self.processor, self.spec, prompt),
                "multi_modal_data": {"image": image},
            }
            for image, prompt in asked
        ]
        outputs = self.engine.generate(prompts, self.sampling, use_tqdm=False)
        if len(outputs) != len(asked):
            raise UserError(
                f"vLLM gave {len(outputs)} answers to {len(asked)} images; finished shards are kept, run the same command again"
            )
        first = [output.outputs[0] for output in outputs]
        return [
            Answer.of(
                self.markers.decode(list(one.token_ids), one.text),
                len(one.token_ids),
                cut=one.finish_reason == "length",
                inside=self.inside,
            )
            for one in first
        ]
