"""Server-side request forgery (SSRF) checks: valid http(s) URLs, the host allow-list, and public addresses only."""

import ipaddress
import re

from yarl import URL

from cm3.common.http import FetchError, hide_secrets, without_secrets

_LONGEST_URL = 8000


class RefusedError(FetchError):
    """The configuration does not allow a request for this URL."""


def parse_url(text: str) -> URL:
    """Return a URL without its fragment, percent-encoded.

    Raises:
        RefusedError: not http(s), not a valid URL, or it holds a user name.
    """
    if len(text) > _LONGEST_URL:
        raise RefusedError(f"refused: the URL has {len(text)} characters")
    try:
        shown = without_secrets(text)[:80]
        url = URL(text.strip()).with_fragment(None)
        if url.scheme not in ("http", "https"):
            raise RefusedError(f"refused: {shown!r} is not http or https")
        if not url.host or url.port == 0:
            raise RefusedError(f"refused: {shown!r} names no host and port")
        if url.user is not None or url.password is not None:
            raise RefusedError("refused: the URL holds a user name or password")
    except ValueError as error:
        raise RefusedError(f"refused: not a valid URL ({hide_secrets(str(error), text)})") from None
    return url


def check_host(url: URL, hosts: list[str], private: bool) -> str:
    """Return the host of a URL in lower case. Call this before the first request and after each redirect.

    Args:
        hosts: the allow-list; `*.example.com` allows every host below example.com.
        private: whether private addresses are allowed.

    Raises:
        RefusedError: the host is not in `hosts`, or is a private address and those are not allowed.
    """
    host = (url.host or "").lower()
    if not is_allowed(host, hosts):
        raise RefusedError(f"refused: {host or 'no host'} is not in images.hosts")
    if private:
        return host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # The system's resolver takes 2130706433, 0x7f.1 and 127.1 for addresses, without a lookup.
        if re.fullmatch(r"(0x[0-9a-f]*|\d+)", host.rstrip(".").rpartition(".")[2]):
            raise RefusedError(f"refused: {host} is an address in an unusual form") from None
        return host
    if not is_public(address):
        raise RefusedError(f"refused: {host} is a private address")
    return host


def is_allowed(host: str, hosts: list[str]) -> bool:
    """Return whether `host` is in the allow-list, or below one of its names that start with `*.`."""
    return any(host == name or (name[:2] == "*." and host.endswith(name[1:])) for name in map(str.lower, hosts))


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address | str) -> bool:
    """Return whether an address is public; for an IPv4 address inside IPv6 (mapped, 6to4, NAT64), whether that one is."""
    if isinstance(address, str):
        address = ipaddress.ip_address(address)
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast
