"""Public addresses, and rate limiting per host."""

import asyncio
import ipaddress
import socket
from pathlib import Path

import aiohttp
import pytest
from oracles_sources import items_file

from cm3.common.errors import UserError
from cm3.common.ssrf import RefusedError, is_public
from cm3.datasets.images.hosts import Host, PublicResolver
from cm3.datasets.images.stage import collect_images


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.0.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::", False),
        ("ff0e::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
    ],
)
def test_public_addresses(address: str, public: bool):
    assert is_public(ipaddress.ip_address(address)) == public


def test_names_of_private_addresses_are_refused_when_connecting():
    async def resolve(private: bool) -> int:
        resolver = PublicResolver(private)
        try:
            return len(await resolver.resolve("localhost", 80))
        finally:
            await resolver.close()

    assert asyncio.run(resolve(True)) >= 1
    with pytest.raises(RefusedError, match="localhost has a private address"):
        asyncio.run(resolve(False))


def test_a_name_that_does_not_exist_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    async def resolve(self, host: str, *arguments, **options) -> list:
        asked.append(host)
        raise socket.gaierror(codes[host], "no answer")

    codes = {"gone.example": socket.EAI_NONAME, "busy.example": socket.EAI_AGAIN}
    monkeypatch.setattr(aiohttp.DefaultResolver, "resolve", resolve)
    spec = {"hosts": list(codes), "private": False, "max_bytes": 10, "max_pixels": 10, "placeholders": []}
    items = items_file(tmp_path / "items.parquet", {host: [f"http://{host}/a.jpg?sig=t0ken"] for host in codes})
    runtime = {"attempts": 3, "pause": 0.01}
    with pytest.raises(UserError, match=r"http://gone\.example/a\.jpg: the host name gone\.example cannot be resolved"):
        collect_images({"find": "urls", **spec}, runtime, items, {}, tmp_path / "out/manifest.parquet")
    assert asked.count("gone.example") == 1 and asked.count("busy.example") == 3


class Clock:
    """A clock that only advances while somebody sleeps, and a host that uses it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.host = Host("h", 50.0, 16, 300.0, clock=lambda: self.now, sleep=self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    def turns(self, count: int) -> float:
        """Seconds that so many turns take."""
        started = self.now

        async def take() -> None:
            for _ in range(count):
                await self.host.turn()

        asyncio.run(take())
        return self.now - started


def test_requests_are_rate_limited_and_slower_after_429():
    clock = Clock()
    host = clock.host
    assert clock.turns(101) == pytest.approx(2.0)
    host.hold(7.0)
    assert clock.turns(1) == pytest.approx(7.0)
    for _ in range(16):  # one burst of 429
        host.slow_down()
    assert host.interval == pytest.approx(2 / 50)
    clock.now += 1
    host.slow_down()
    assert host.interval == pytest.approx(4 / 50)
    clock.now += 10
    clock.turns(1)
    assert host.interval == pytest.approx(2 / 50)
    clock.now += 1000
    clock.turns(1)
    assert host.interval == pytest.approx(1 / 50)
    for _ in range(100):
        clock.now += 1
        host.slow_down()
    assert host.interval == pytest.approx(64 / 50)


def test_a_silent_host_is_retried_for_a_while_then_down():
    clock = Clock()
    host = clock.host
    host.answered()
    for _ in range(100):
        host.unanswered("why")
    assert not host.down and clock.turns(1) >= 1.0
    clock.now += 200
    host.answered()
    host.unanswered("why")
    clock.now += 301
    host.unanswered("why")
    assert not host.down  # two alone say nothing
    for _ in range(20):
        host.unanswered("why")
    assert host.down == "why"
