"""Proxies of image downloads, from the environment: http_proxy, https_proxy, all_proxy, no_proxy."""

import urllib.request

from yarl import URL

from cm3.common.errors import UserError


def environment_proxies() -> dict[str, URL]:
    """Return the proxy of http and of https URLs, where the environment sets one.

    A value without a scheme is an HTTP proxy, as for curl: `proxy.example.com:3128`.

    Raises:
        UserError: a value is not the address of an HTTP proxy.
    """
    found = urllib.request.getproxies()
    proxies = {}
    for scheme in ("http", "https"):
        name = next((name for name in (scheme, "all") if found.get(name, "").strip()), None)
        if name is not None:
            proxies[scheme] = _parse(f"{name}_proxy", found[name].strip())
    return proxies


def proxy_of(url: URL, proxies: dict[str, URL]) -> URL | None:
    """Return the proxy of a request; None for hosts in no_proxy."""
    proxy = proxies.get(url.scheme)
    return None if proxy is None or urllib.request.proxy_bypass(url.host or "") else proxy


def _parse(name: str, value: str) -> URL:
    # The value may hold a password, so it is not part of a message.
    try:
        proxy = URL(value if "://" in value else f"http://{value}")
        valid = bool(proxy.host) and proxy.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"the environment variable {name} is not the address of a proxy; write http://host:port")
    if proxy.scheme not in ("http", "https"):
        raise UserError(
            f"the environment variable {name} names a proxy of the kind {proxy.scheme}; images are downloaded through HTTP "
            "proxies only: write http://host:port"
        )
    return proxy
