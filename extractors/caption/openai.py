"""Captions from an OpenAI-compatible server: vLLM on another machine, or a service."""

import asyncio
import base64
import io
import logging
import re
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit

from PIL import Image
from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, field_validator

from cm3.common.strict import Float
from extractors.caption.base import (
    NOTHING_AFTER_THOUGHT,
    PROMPT,
    UNFINISHED_CUT,
    Answer,
    Captioner,
    CaptionResult,
    CaptionSpec,
    load_image,
)
from extractors.caption.prompt import Prompted
from extractors.caption.thoughts import split_thoughts
from extractors.extractor import Advance, silent
from extractors.runtime.prefetch import default_workers
from extractors.spec import Cost

if TYPE_CHECKING:
    import openai

    from extractors.caption.openai_client import Completion

log = logging.getLogger(__name__)
T = TypeVar("T")

Numbered = Iterator[tuple[int, Prompted]]
"""Inputs with their row numbers."""

_CHAT = "/chat/completions"
_HIDDEN = "(not shown)"
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_JPEG_QUALITY = 90
_LETTERS_PER_TOKEN = 40  # more than any tokenizer's: a longer answer ignored max_tokens
_MAX_NAMES = 20
_PROBE_TOKENS = 2048  # enough for a model that thinks to end its thought
_SET_ELSEWHERE = {
    "model": "use model",
    "messages": "use prompt and system_prompt",
    "max_tokens": "use max_new_tokens and max_thought_tokens",
    "max_completion_tokens": "use max_new_tokens and max_thought_tokens",
    "chat_template_kwargs": "use chat_template_kwargs of the extractor",
    "stream": "answers are not streamed",
    "n": "one answer per image is used",
}
"""Fields of a request that `extra_body` cannot set, with what to use instead."""


def _without_secrets(value: Any) -> Any:
    # Error messages quote the refused value, and this one may hold a password.
    return _HIDDEN if isinstance(value, str) and any(mark in value for mark in "@?#") else value


def _base_of(value: str) -> str:
    if value == _HIDDEN:
        raise ValueError("remove user, password and ?query: the key comes from the environment, see api_key_env")
    try:
        parts = urlsplit(value.strip())
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 80) > 0
    except ValueError:
        known = False
    if not known:
        raise ValueError("expected the address of a server, such as http://127.0.0.1:8000/v1")
    path = parts.path.rstrip("/").removesuffix(_CHAT).rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _named_or_hidden(value: Any) -> Any:
    return _HIDDEN if isinstance(value, str) and not _VARIABLE.fullmatch(value) else value


def _name_of_variable(value: str) -> str:
    if value == _HIDDEN:
        raise ValueError("expected the name of an environment variable in capitals, such as OPENAI_API_KEY, not a key")
    return value


# pydantic applies the last validator first.
Address = Annotated[str, AfterValidator(_base_of), BeforeValidator(_without_secrets)]
VariableName = Annotated[str, AfterValidator(_name_of_variable), BeforeValidator(_named_or_hidden)]


class ServerCaptionSpec(CaptionSpec):
    """Captions from any server with OpenAI's chat completions, which receives the images and item texts."""

    version: ClassVar[int | None] = 1
    libraries: ClassVar[tuple[str, ...]] = ("pillow",)
    cost: ClassVar[Cost] = Cost(1500, 0, 1)
    runtime_fields: ClassVar[frozenset[str]] = CaptionSpec.runtime_fields | {
        "url",
        "api_key_env",
        "concurrency",
        "timeout",
        "attempts",
        "patience",
    }

    backend: Literal["openai-caption"] = Field(description="Caption images on an OpenAI-compatible server.")
    url: Address = Field(description="Base URL of the server, such as http://127.0.0.1:8000/v1.")
    model: str = Field(min_length=1, description="Name of the model on the server.")
    extra_body: dict[str, JsonValue] | None = Field(
        None,
        min_length=1,
        description="Further fields of each request, such as {reasoning_effort: low}; default: none. They are recorded.",
    )
    revision: str | None = Field(
        None,
        min_length=1,
        description="Your own label of the served weights, such as a commit; the server cannot confirm it.",
    )
    api_key_env: VariableName = Field(
        "OPENAI_API_KEY",
        description="Name of the environment variable with the API key, never the key itself; if it is not set, no key is sent.",
    )
    concurrency: int = Field(8, gt=0, le=256, description="Number of concurrent requests.")
    timeout: Float = Field(
        120.0, gt=0, le=3600, description="Seconds until a request without an answer counts as failed."
    )
    attempts: int = Field(
        5,
        gt=0,
        le=20,
        description="Failed attempts until a request is given up, provided that the server still answers others.",
    )
    patience: Float = Field(
        300.0, gt=0, le=86400, description="Seconds without any successful answer until the job ends."
    )

    @field_validator("extra_body")
    @classmethod
    def _fields_of_its_own(cls, value: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        if set_elsewhere := sorted(_SET_ELSEWHERE.keys() & set(value or ())):
            name = set_elsewhere[0]
            raise ValueError(f"{name} is not set here; {_SET_ELSEWHERE[name]}")
        return value

    def uses_gpu(self) -> bool:
        """Return False: the GPU is the server's."""
        return False

    def load(self) -> "ServerCaptioner":
        """Find the server."""
        return ServerCaptioner(self)


class ServerCaptioner(Captioner):
    """A server that captions images, several at once."""

    device = "server"

    def __init__(self, spec: ServerCaptionSpec) -> None:
        from extractors.caption.openai_client import ChatClient
        from extractors.caption.openai_retry import CircuitBreaker

        self.spec: ServerCaptionSpec = spec
        self._client = ChatClient(spec.url, spec.api_key_env, spec.concurrency, spec.timeout)
        self._breaker = CircuitBreaker(self._client, spec.attempts, spec.patience)
        self._inside: bool | None = None  # whether answers begin inside a thought; None: not known yet
        self._models: set[str] = set()
        self._fingerprints: set[str] = set()
        served = run_async(self._client.models(spec.attempts))
        if served and spec.model not in served:
            log.warning("%s: lists %s, not %s", spec.url, ", ".join(sorted(served)[:5]), spec.model)
        self._root: str = served.get(spec.model, "")

    def facts(self) -> dict[str, Any]:
        """Return the requested model, the models that answered, the prompt and the decoding."""
        name = self.spec.model if self.spec.revision is None else f"{self.spec.model}@{self.spec.revision}"
        answered_by = {
            "models": sorted(self._models),
            "fingerprints": sorted(self._fingerprints),
            "roots": [self._root] if self._root else [],
        }
        facts = self.spec.facts(name) | {"answered_by": answered_by}
        if self.spec.extra_body is not None:
            facts["extra_body"] = self.spec.extra_body
        if refused := sorted(self._client.parameters.refused):
            facts["decoding"] = facts["decoding"] | {"refused_parameters": refused}
            if "temperature" in refused:
                facts["decoding"]["strategy"] = "the server's own"
        return facts

    def run(self, inputs: Iterable[Prompted], advance: Advance = silent) -> CaptionResult:
        """Caption images and return the captions in input order; images without an answer are failed.

        Raises:
            UserError: no request can succeed: wrong address or key, or the server is down.
        """
        return CaptionResult.of(run_async(self._run(inputs, advance)))

    async def _run(self, inputs: Iterable[Prompted], advance: Advance) -> list[Answer]:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(max(1, default_workers(self.spec.workers))))
        answers: dict[int, Answer] = {}
        self._breaker.reset_clock()
        self._probing = asyncio.Lock()
        async with self._client.session() as session:
            early = await self._ask_all(session, enumerate(inputs), answers, advance)
            if early and not self._breaker.answered:  # too few items to tell a broken server by
                white = self._request(_data_url(Image.new("RGB", (224, 224), "white")), PROMPT)
                await self._breaker.require_working(session, white, len(early))
            if early:  # they failed before the server was ready
                await self._ask_all(session, iter(early), answers, advance)
        return [answers[row] for row in sorted(answers)]

    async def _ask_all(
        self, session: "openai.AsyncOpenAI", inputs: Numbered, answers: dict[int, Answer], advance: Advance
    ) -> list[tuple[int, Prompted]]:
        """Fill in the answers by row, and return the inputs that failed before the server's first completion."""
        from extractors.caption.openai_client import RejectedError

        early: list[tuple[int, Prompted]] = []

        async def work() -> None:
            for row, one in inputs:  # shared by all workers
                try:
                    answers[row] = answer = await self._answer(session, one)
                except RejectedError as error:
                    answers[row] = answer = Answer("", reason=str(error))
                    if error.early:
                        early.append((row, one))
                        continue
                advance(1, **{"ok" if answer.text else "failed": 1})

        workers = [asyncio.create_task(work()) for _ in range(self.spec.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return early

    async def _answer(self, session: "openai.AsyncOpenAI", one: Prompted) -> Answer:
        image, reason = await asyncio.to_thread(self._encode, one.image)
        if image is None:
            return Answer("", reason=reason)
        request = self._request(image, one.prompt)
        completion = await self._breaker.complete(session, request)
        self._record_model(completion)
        letters, limit = len(completion.text), self.spec.token_limit()
        if letters > _LETTERS_PER_TOKEN * limit:
            reason = f"the answer has {letters} letters, more than {limit} tokens can hold"
            return Answer("", completion.tokens, reason=reason)
        if not completion.text.strip():
            reason = UNFINISHED_CUT if completion.cut else NOTHING_AFTER_THOUGHT
            return Answer("", completion.tokens, reason=reason)
        inside = (
            completion.cut
            and not completion.thought
            and not split_thoughts(completion.text).thought
            and await self._starts_inside_thought(session, request)
        )
        return Answer.of(completion.text, completion.tokens, completion.cut, inside)

    async def _starts_inside_thought(self, session: "openai.AsyncOpenAI", request: dict[str, Any]) -> bool:
        """Return whether answers begin inside a thought, which shows in an answer that is long enough to end it.

        A template may put the opening marker into the prompt. A thought that is cut then looks like a caption.
        """
        from extractors.caption.openai_client import RejectedError

        async with self._probing:
            if self._inside is None:
                try:
                    probe = await self._breaker.complete(session, request | {"max_tokens": _PROBE_TOKENS})
                    self._inside = split_thoughts(probe.text).opened_before
                except RejectedError as error:
                    log.warning("%s: whether its cut answers are thoughts is unknown: %s", self.spec.url, error)
                    self._inside = False
        return self._inside

    def _request(self, image: str, prompt: str) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": prompt}]
        system = [] if self.spec.system_prompt is None else [{"role": "system", "content": self.spec.system_prompt}]
        variables = self.spec.chat_template_kwargs
        return {
            "model": self.spec.model,
            "messages": [*system, {"role": "user", "content": content}],
            "max_tokens": self.spec.token_limit(),
            "temperature": 0,
            "seed": 0,
            **({} if variables is None else {"chat_template_kwargs": variables}),
            **(self.spec.extra_body or {}),
        }

    def _encode(self, data: bytes) -> tuple[str | None, str]:
        """Return an image as a data URL, or None and the reason why it can't be decoded.

        Encoding anew gives the server the pixels that a local model would get, without the file's metadata (place, time,
        camera).
        """
        image = load_image(data, self.spec.max_pixels, self.spec.min_pixels)
        if isinstance(image, str):
            return None, image
        return _data_url(image), ""

    def _record_model(self, completion: "Completion") -> None:
        model, fingerprint = completion.model, completion.fingerprint
        if model and model not in self._models and len(self._models) < _MAX_NAMES:
            if self._models:
                log.warning("%s: %r answers now, before it was %s", self.spec.url, model, sorted(self._models))
            self._models.add(model)
        if fingerprint and len(self._fingerprints) < _MAX_NAMES:
            self._fingerprints.add(fingerprint)


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also inside a notebook's running event loop.

    A signal that stops the process raises SystemExit or KeyboardInterrupt wherever the loop is at the time, in any task:
    asyncio then does not log that nobody took the exception of that task.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_without_log_of_stops(work))
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, _without_log_of_stops(work)).result()


async def _without_log_of_stops(work: Coroutine[Any, Any, T]) -> T:
    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), SystemExit | KeyboardInterrupt):
            loop.default_exception_handler(context)

    asyncio.get_running_loop().set_exception_handler(handle)
    return await work
