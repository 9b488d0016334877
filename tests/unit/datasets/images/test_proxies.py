"""Proxies from the environment: their spelling, all_proxy, and faults that stop the stage with a message of their own."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from oracles_sources import image, items_file, respond, serving
from yarl import URL

from cm3.common.errors import UserError
from cm3.common.tables import MANIFEST, read_table
from cm3.datasets.images.config import Images
from cm3.datasets.images.proxies import environment_proxies, proxy_of
from cm3.datasets.images.stage import collect_images

RUNTIME = {"attempts": 2, "pause": 0.01, "rate": 10_000.0, "timeout": 60.0, "threads": 2}
GOOD = image()


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Only these proxies in the environment."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with mock.patch.dict(os.environ, {**kept, **variables}, clear=True):
        yield


def collect(folder: Path, urls: list[str]) -> list[dict[str, Any]]:
    items = items_file(folder / "items.parquet", {str(n): [url] for n, url in enumerate(urls)})
    spec = Images(hosts=["img.example.com"], private=True).spec()
    collect_images(spec, RUNTIME, items, {}, folder / "out" / "manifest.parquet")
    return read_table(folder / "out" / "manifest.parquet", MANIFEST).to_pylist()


@pytest.mark.parametrize(
    ("variables", "http", "https"),
    [
        ({}, None, None),
        ({"http_proxy": "proxy.corp:3128"}, "http://proxy.corp:3128", None),
        ({"http_proxy": "http://proxy.corp:3128/"}, "http://proxy.corp:3128/", None),
        ({"all_proxy": "proxy.corp:3128"}, "http://proxy.corp:3128", "http://proxy.corp:3128"),
        ({"ALL_PROXY": "10.0.0.1:80", "https_proxy": "https://p:1"}, "http://10.0.0.1:80", "https://p:1"),
        ({"http_proxy": " ", "all_proxy": "p:1"}, "http://p:1", "http://p:1"),
        ({"all_proxy": "p:1", "no_proxy": "*"}, None, None),
        ({"all_proxy": "p:1", "no_proxy": ".example.com"}, None, None),
        ({"https_proxy": "name:word@p:1"}, None, "http://name:word@p:1"),
    ],
)
def test_proxies_of_the_environment(variables: dict[str, str], http: str | None, https: str | None) -> None:
    with environment(**variables):
        proxies = environment_proxies()
        found = [proxy_of(URL(f"{scheme}://img.example.com/a.jpg"), proxies) for scheme in ("http", "https")]
    assert found == [URL(one) if one else None for one in (http, https)]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("socks5://proxy.corp:1080", "all_proxy names a proxy of the kind socks5; .*write http://host:port"),
        ("http://", "all_proxy is not the address of a proxy; write http://host:port"),
        ("proxy.corp:port", "all_proxy is not the address"),
        ("http://name:secret@proxy.corp:port", "all_proxy is not the address"),
        (":3128", "all_proxy is not the address"),
    ],
)
def test_a_value_that_is_no_proxy_stops_the_stage_once(tmp_path: Path, value: str, reason: str) -> None:
    with environment(all_proxy=value), pytest.raises(UserError, match=reason) as raised:
        collect(tmp_path, [f"http://img.example.com/{n}.jpg" for n in range(50)])
    assert "secret" not in str(raised.value) and "img.example.com" not in str(raised.value)


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy", "ALL_PROXY"])
def test_images_come_through_a_proxy_without_a_scheme(tmp_path: Path, variable: str) -> None:
    with serving() as server:
        server.answers = {"http://img.example.com/a.jpg": respond(GOOD)}
        with environment(**{variable: f"127.0.0.1:{server.server_address[1]}"}):
            rows = collect(tmp_path, ["http://img.example.com/a.jpg"])
        assert server.asked == ["http://img.example.com/a.jpg"]
    assert [row["status"] for row in rows] == ["ok"]


def test_a_proxy_that_asks_for_a_password_stops_the_stage(tmp_path: Path) -> None:
    with serving() as server:
        server.answers = {"http://img.example.com/a.jpg": respond(b"", 407)}
        with (
            environment(http_proxy=f"127.0.0.1:{server.server_address[1]}"),
            pytest.raises(UserError, match=r"proxy of the environment answers 407 .*name and password"),
        ):
            collect(tmp_path, ["http://img.example.com/a.jpg"])


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_out_of_reach_stops_the_stage(tmp_path: Path, scheme: str) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        port = unheard.getsockname()[1]
        with (
            environment(all_proxy=f"127.0.0.1:{port}"),
            pytest.raises(UserError, match=rf"the proxy 127\.0\.0\.1:{port} of the environment cannot be reached"),
        ):
            collect(tmp_path, [f"{scheme}://img.example.com/{n}.jpg" for n in range(3)])


@pytest.mark.parametrize(
    ("host", "right"),
    [
        ("https://img.example.com", "img.example.com"),
        ("http://img.example.com/images/", "img.example.com"),
        ("img.example.com:80", "img.example.com"),
        ("img.example.com/", "img.example.com"),
        (" img.example.com", "img.example.com"),
        ("user@img.example.com", "img.example.com"),
        ("*.example.com:443", r"\*\.example\.com"),
        ("*example.com", r"\*\.example\.com"),
        (".example.com", r"\*\.example\.com"),
        ("[::1]", "::1"),
        ("127.0.0.1:8080", "127.0.0.1"),
        ("xn--bcher-kva.de", "bücher.de"),
    ],
)
def test_hosts_that_can_never_match_are_refused_with_the_right_spelling(host: str, right: str) -> None:
    with pytest.raises(ValueError, match=rf"matches no host, because it is not a host name alone; write {right}( |$)"):
        Images(hosts=["a.org", host])


@pytest.mark.parametrize("host", ["*", "", "*.", "*.*", "img.*.com", "https://", "a..b"])
def test_hosts_that_name_no_host_are_refused(host: str) -> None:
    with pytest.raises(ValueError, match=r"matches no host; list each host, such as img\.example\.com"):
        Images(hosts=[host])


@pytest.mark.parametrize(
    "host", ["a.org", "*.a.org", "IMG.Example.com", "::1", "127.0.0.1", "bücher.de", "localhost", "a_b.org"]
)
def test_hosts_that_can_match_are_kept_as_they_are(host: str) -> None:
    assert Images(hosts=[host]).spec()["hosts"] == [host]
