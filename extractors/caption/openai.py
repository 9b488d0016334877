"""Images to captions by asking an OpenAI-compatible server: vLLM on another machine, or a service."""

import asyncio
import base64
import io
import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from PIL import Image
from pydantic import AfterValidator, BeforeValidator, Field

from cm3.common.strict import Float
from extractors.caption.base import PROMPT, Answer, Captioned, Captioner, CaptionSpec, Prompted, readable
from extractors.extractor import Advance, silent
from extractors.runtime.prefetch import default_workers
from extractors.spec import Cost
from extractors.text.item_text import clean

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

Numbered = Iterator[tuple[int, Prompted]]
"""Inputs with their rows."""

_CHAT = "/chat/completions"
_HIDDEN = "(not shown)"
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_QUALITY = 90
_LETTERS_PER_TOKEN = 40  # more than any tokenizer's: an answer beyond is not what was asked for
_NAMES_KEPT = 20


def _without_secrets(value: Any) -> Any:
    # An error quotes the value that it refuses, and this one may hold a password.
    return _HIDDEN if isinstance(value, str) and any(mark in value for mark in "@?#") else value


def _base_of(value: str) -> str:
    if value == _HIDDEN:
        raise ValueError("no user, password or ?query in it: the key comes from the environment, see api_key_env")
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


# The last one comes first.
Address = Annotated[str, AfterValidator(_base_of), BeforeValidator(_without_secrets)]
VariableName = Annotated[str, AfterValidator(_name_of_variable), BeforeValidator(_named_or_hidden)]


class ServerCaptionSpec(CaptionSpec):
    """A captioner on a server: any that speaks OpenAI's chat completions. It is sent the images and item texts."""

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

    backend: Literal["openai-caption"] = Field(description="Caption images by asking an OpenAI-compatible server.")
    url: Address = Field(description="Base URL of the server, such as http://127.0.0.1:8000/v1; it may move.")
    model: str = Field(min_length=1, description="Name of the model, as the server knows it.")
    revision: str | None = Field(
        None, min_length=1, description="Which weights are served, in your words: the server can't prove it."
    )
    api_key_env: VariableName = Field(
        "OPENAI_API_KEY",
        description="Name of the environment variable with the key, never the key itself; none set: no key is sent.",
    )
    concurrency: int = Field(8, gt=0, le=256, description="Requests under way at once.")
    timeout: Float = Field(120.0, gt=0, le=3600, description="Seconds for one answer.")
    attempts: int = Field(
        5,
        gt=0,
        le=20,
        description="Bad answers to a request until it is doubted: it fails if the server still answers others.",
    )
    patience: Float = Field(
        300.0, gt=0, le=86400, description="Seconds without one good answer, for all its refusals, until the job ends."
    )

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
        from extractors.caption.openai_client import ChatServer

        self.spec: ServerCaptionSpec = spec
        self.server = ChatServer(
            spec.url, spec.api_key_env, spec.concurrency, spec.timeout, spec.attempts, spec.patience
        )
        self._models: set[str] = set()
        self._fingerprints: set[str] = set()
        served = _in_loop(self.server.models())
        if served and spec.model not in served:
            log.warning("%s: lists %s, not %s", spec.url, ", ".join(sorted(served)[:5]), spec.model)
        self._root: str = served.get(spec.model, "")

    def facts(self) -> dict[str, Any]:
        """Return the model by the name that it was asked for and those that it answered by, prompt and decoding."""
        name = self.spec.model if self.spec.revision is None else f"{self.spec.model}@{self.spec.revision}"
        told = {
            "models": sorted(self._models),
            "fingerprints": sorted(self._fingerprints),
            "roots": [self._root] if self._root else [],
        }
        return self.spec.facts(name) | {"answered_by": told}

    def run(self, inputs: Iterable[Prompted], advance: Advance = silent) -> Captioned:
        """Caption images in their order, however many are asked for at once; what gets no answer is failed.

        Raises:
            UserError: it is no use to go on: wrong address or key, or the server is out of order.
        """
        return Captioned.of(_in_loop(self._run(inputs, advance)))

    async def _run(self, inputs: Iterable[Prompted], advance: Advance) -> list[Answer]:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(max(1, default_workers(self.spec.workers))))
        answers: dict[int, Answer] = {}
        async with self.server.session() as session:
            early = await self._ask_all(session, enumerate(inputs), answers, advance)
            if early and not self.server.answered:  # too few items to tell a sick server by
                await self.server.prove(session, self._harmless(), len(early))
            if early:  # they came while the server was not in order yet
                await self._ask_all(session, iter(early), answers, advance)
        return [answers[row] for row in sorted(answers)]

    async def _ask_all(
        self, session: "aiohttp.ClientSession", inputs: Numbered, answers: dict[int, Answer], advance: Advance
    ) -> list[tuple[int, Prompted]]:
        """Fill in the answers by row, and return the inputs that failed before the server gave its first good answer."""
        from extractors.caption.openai_replies import RefusedError

        early: list[tuple[int, Prompted]] = []

        async def work() -> None:
            for row, one in inputs:  # shared: whoever is free takes the next one
                try:
                    answers[row] = answer = await self._answer(session, one)
                except RefusedError as refusal:
                    answers[row] = answer = Answer("", reason=str(refusal))
                    if refusal.early:
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

    async def _answer(self, session: "aiohttp.ClientSession", one: Prompted) -> Answer:
        image, reason = await asyncio.to_thread(self._data_url, one.image)
        if image is None:
            return Answer("", reason=reason)
        reply = await self.server.ask(session, self._request(image, one.prompt))
        self._note(reply.model, reply.fingerprint)
        if len(reply.text) > _LETTERS_PER_TOKEN * self.spec.max_new_tokens:
            return Answer(
                "", reply.tokens, reason=f"the answer has {len(reply.text)} letters, not the tokens asked for"
            )
        return Answer(clean(reply.text), reply.tokens, reply.cut)

    def _harmless(self) -> dict[str, Any]:
        """Return a request that has nothing in it that could be refused."""
        return self._request(_as_url(Image.new("RGB", (224, 224), "white")), PROMPT)

    def _request(self, image: str, prompt: str) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": prompt}]
        return {
            "model": self.spec.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.spec.max_new_tokens,
            "temperature": 0,
            "seed": 0,
        }

    def _data_url(self, data: bytes) -> tuple[str | None, str]:
        """Return an image as a data URL, or the reason why it can't be decoded.

        It is encoded anew: the server gets the pixels that a local model would be shown, and none of the file's notes
        on where, when and by whom it was taken.
        """
        image = readable(data, self.spec.max_pixels)
        if isinstance(image, str):
            return None, image
        return _as_url(image), ""

    def _note(self, model: str, fingerprint: str) -> None:
        if model and model not in self._models and len(self._models) < _NAMES_KEPT:
            if self._models:
                log.warning("%s: %r answers now, before it was %s", self.spec.url, model, sorted(self._models))
            self._models.add(model)
        if fingerprint and len(self._fingerprints) < _NAMES_KEPT:
            self._fingerprints.add(fingerprint)


def _as_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _in_loop(work: Any) -> Any:
    """Run a coroutine to its end, also where a notebook's event loop runs already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
