"""Which addresses are public, and at what pace a host is asked."""

import asyncio
import ipaddress

import pytest

from cm3.datasets.images import hosts as images_hosts
from cm3.datasets.images.hosts import Host, PublicResolver, RefusedError, is_public


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


def test_names_of_private_addresses_are_refused_when_connecting(monkeypatch: pytest.MonkeyPatch):
    async def resolve(private: bool) -> int:
        resolver = PublicResolver(private)
        try:
            return len(await resolver.resolve("localhost", 80))
        finally:
            await resolver.close()

    assert asyncio.run(resolve(True)) >= 1
    with pytest.raises(RefusedError, match="localhost has a private address"):
        asyncio.run(resolve(False))


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(images_hosts, "_now", lambda: self.now)
        monkeypatch.setattr(images_hosts.asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    def turns(self, host: Host, count: int) -> float:
        """Seconds that so many turns take."""
        started = self.now

        async def take() -> None:
            for _ in range(count):
                await host.turn()

        asyncio.run(take())
        return self.now - started


def test_a_host_is_asked_at_its_rate_and_more_slowly_when_it_complains(monkeypatch: pytest.MonkeyPatch):
    clock, host = Clock(monkeypatch), Host("h", 50.0, 16, 300.0)
    assert clock.turns(host, 101) == pytest.approx(2.0)
    host.hold(7.0)
    assert clock.turns(host, 1) == pytest.approx(7.0)
    for _ in range(16):  # one burst of 429
        host.slow_down()
    assert host.interval == pytest.approx(2 / 50)
    clock.now += 1
    host.slow_down()
    assert host.interval == pytest.approx(4 / 50)
    clock.now += 10
    clock.turns(host, 1)
    assert host.interval == pytest.approx(2 / 50)
    clock.now += 1000
    clock.turns(host, 1)
    assert host.interval == pytest.approx(1 / 50)
    for _ in range(100):
        clock.now += 1
        host.slow_down()
    assert host.interval == pytest.approx(64 / 50)


def test_a_host_that_falls_silent_is_waited_for_and_given_up_in_the_end(monkeypatch: pytest.MonkeyPatch):
    clock, host = Clock(monkeypatch), Host("h", 50.0, 16, 300.0)
    host.answered()
    for _ in range(100):
        host.unanswered("why")
    assert not host.down and clock.turns(host, 1) >= 1.0
    clock.now += 200
    host.answered()
    host.unanswered("why")
    clock.now += 301
    host.unanswered("why")
    assert not host.down  # two alone say nothing
    for _ in range(20):
        host.unanswered("why")
    assert host.down == "why"
