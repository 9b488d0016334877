"""Secrets in URLs: removed from messages, and passed to child processes in the environment."""

import os
import socket
import subprocess
import sys

import pytest

from cm3.common.errors import UserError
from cm3.common.http import SECRET_URLS, conceal, hide_secrets, resolution_error, reveal, without_secrets
from cm3.common.strict import Strict, validate


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("https://host/tree/a.gz", "https://host/tree/a.gz"),
        ("http://[::1]:8000/a@b/c:d", "http://[::1]:8000/a@b/c:d"),
        ("https://me:pw@host:8000/a", "https://host:8000/a"),
        ("https://token@host/a", "https://host/a"),
        ("https://host/a?sig=abc&x=1#part", "https://host/a"),
        ("https://host?sig=abc", "https://host"),
        ("https://me:p@w@host/a", "https://host/a"),
        ("https://me:p/w@host/a", "https://host/a"),
        ("https://me:p?w#d@host/a", "https://host/a"),
        ("https://@host/a", "https://host/a"),
        ("socks5://me:pw@proxy:1080", "socks5://proxy:1080"),
        ("me:pw@host/a", "host/a"),
        ("login?token=abc", "login"),
        ("", ""),
    ],
)
def test_a_url_without_its_secrets(url: str, plain: str):
    assert without_secrets(url) == plain == without_secrets(plain)


def test_a_message_without_the_secrets_of_its_urls():
    text = "tried 'https://me:pw@host/a?sig=abc', then <http://b/c>: me:pw@host refused"
    assert hide_secrets(text) == "tried 'https://host/a', then <http://b/c>: host refused"
    url = "https://me:pa%2Fss@host/a?sig=ab%20cd&x=1"
    assert hide_secrets("bad port 'pa%2Fss' or pa/ss; sig=ab%20cd&x=1, ab cd", url) == "bad port '***' or ***; ***, ***"


def test_the_secrets_of_an_invalid_url_are_found():
    assert hide_secrets("Invalid port: 'pass'; word", "https://me:pass/word@host/a") == "Invalid port: '***'; ***"


def test_secrets_reach_a_child_through_the_environment_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(SECRET_URLS, raising=False)
    urls = ["https://host/a", "https://me:pw@host/a", "https://you:pw@host/a"]
    shown = conceal(urls)
    assert shown[0] == urls[0] and len(set(shown)) == 3 and "pw" not in "".join(shown)
    assert conceal(reversed(urls)) == shown[::-1]
    assert reveal(shown) == urls
    code = "import sys; from cm3.common.http import reveal; print(*reveal(sys.argv[1:]))"
    child = subprocess.run(
        [sys.executable, "-c", code, *shown], env=dict(os.environ), capture_output=True, text=True, check=True
    )
    assert child.stdout.split() == urls
    monkeypatch.delenv(SECRET_URLS)
    with pytest.raises(UserError, match=f"{SECRET_URLS} does not hold this URL"):
        reveal(shown)


def test_a_refused_setting_is_quoted_without_its_secrets():
    class Mirror(Strict):
        url: int

    with pytest.raises(UserError, match=r"^mirror\.url = 'ftp://host/a': ") as error:
        validate(Mirror, {"url": "ftp://me:pw@host/a?sig=abc"}, "mirror")
    assert "pw" not in str(error.value) and "abc" not in str(error.value)


def test_only_a_name_that_does_not_exist_is_final():
    unknown = resolution_error("h.org", socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    assert str(unknown).startswith("the host name h.org cannot be resolved (Name or service not known)")
    assert resolution_error("h.org", socket.gaierror(socket.EAI_AGAIN, "Try again")) is None
    assert resolution_error("h.org", OSError(5, "Input/output error")) is None
