"""A loopback server of generated images with faults for one URL in five, always the same ones.

In a process of its own: `python tests/support/image_server.py` prints its port and serves until its standard input closes.
"""

import argparse
import asyncio
import collections
import contextlib
import io
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from aiohttp import web
from PIL import Image

NOT_FOUND = range(0, 10)
BROKEN_ONCE = range(10, 14)
CUT_ONCE = range(14, 16)
TRUNCATED = range(16, 18)
DOT = range(18, 19)
BUSY_ONCE = range(19, 20)
ONCE = (*BROKEN_ONCE, *CUT_ONCE, *BUSY_ONCE)


def status_of(number: int) -> str:
    """The status in the manifest of the item whose only image is number `number`."""
    kind = number % 100
    return "missing" if kind in NOT_FOUND or kind in DOT else "failed" if kind in TRUNCATED else "ok"


def make_bases(sizes: range) -> list[bytes]:
    """Some JPEGs that look like photos to a decoder; at 300 to 500 pixels they have 15 to 40 kB."""
    bases = []
    for width in sizes:
        file = io.BytesIO()
        size = (width, width - 20)
        noise = Image.effect_noise((width // 4, width // 4), 50).resize(size, Image.Resampling.BICUBIC)
        image = Image.merge(
            "RGB", (noise, noise.transpose(Image.Transpose.ROTATE_180), Image.linear_gradient("L").resize(size))
        )
        image.save(file, "JPEG", quality=55)
        bases.append(file.getvalue())
    return bases


def distinct(base: bytes, number: int) -> bytes:
    """The same image with other bytes: a comment holds the number."""
    note = f"{number:012d}".encode()
    return base[:2] + b"\xff\xfe" + (len(note) + 2).to_bytes(2, "big") + note + base[2:]


class Shop:
    """Serves /image/N.jpg, and /asked with the number of requests for each."""

    def __init__(self, bases: list[bytes], delay: float) -> None:
        self.bases, self.delay = bases, delay
        self.asked: collections.Counter[str] = collections.Counter()
        dot = io.BytesIO()
        Image.new("RGB", (1, 1)).save(dot, "GIF")
        self.dot = dot.getvalue()

    async def image(self, request: web.Request) -> web.StreamResponse:
        number = int(request.match_info["number"])
        self.asked[str(number)] += 1
        if self.delay:
            await asyncio.sleep(self.delay)
        kind, first = number % 100, self.asked[str(number)] == 1
        if kind in NOT_FOUND:
            return web.Response(status=404, text="no such image")
        if kind in DOT:
            return web.Response(body=self.dot, content_type="image/gif")
        if first and kind in BROKEN_ONCE:
            return web.Response(status=500, text="try again")
        if first and kind in BUSY_ONCE:
            return web.Response(status=429, headers={"Retry-After": "0"})
        data = distinct(self.bases[number % len(self.bases)], number)
        if kind in TRUNCATED:
            data = data[: len(data) * 2 // 3]
        if first and kind in CUT_ONCE:
            answer = web.StreamResponse(headers={"Content-Length": str(len(data))})
            await answer.prepare(request)
            await answer.write(data[: len(data) // 2])
            if request.transport is not None:
                request.transport.close()
            return answer
        return web.Response(body=data, content_type="image/jpeg")

    async def counts(self, request: web.Request) -> web.Response:
        return web.json_response(self.asked)


async def serve(shop: Shop) -> None:
    """Serve until standard input closes."""
    app = web.Application()
    app.add_routes([web.get("/image/{number}.jpg", shop.image), web.get("/asked", shop.counts)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


class Address:
    """URLs of a running server."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"

    def url(self, number: int) -> str:
        return f"{self.root}/image/{number}.jpg"

    def asked(self) -> dict[int, int]:
        """The number of requests for each image."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.root}/asked", timeout=300) as answer:
            return {int(number): count for number, count in json.load(answer).items()}


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Address]:
    """A server in a process of its own, with the command line's `arguments`."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "no_proxy": "*"},
    )
    try:
        assert process.stdout is not None
        yield Address(int(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs=2, default=[300, 500], help="widths in pixels, from and below")
    parser.add_argument("--kinds", type=int, default=100, help="number of different images beneath the comments")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    options = parser.parse_args()
    low, high = options.sizes
    widths = range(low, high, max(1, (high - low) // options.kinds))
    asyncio.run(serve(Shop(make_bases(widths), options.delay)))
