"""A headless Chromium, driven over its debugging pipe: no library, no port, no network."""

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium() -> str:
    """Return the path of a Chromium, or skip the test; CM3_TEST_BROWSER names another one."""
    path = os.environ.get("CM3_TEST_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if not path:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium), or set CM3_TEST_BROWSER")
    return path


class Browser:
    """A running Chromium. Use as a context manager."""

    def __enter__(self) -> "Browser":
        self._folder = tempfile.TemporaryDirectory()
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        def wire() -> None:
            # The debugging pipe is descriptor 3 to the browser and 4 from it.
            reader, writer = os.dup(to_browser), os.dup(from_browser)
            os.dup2(reader, 3)
            os.dup2(writer, 4)

        self._process = subprocess.Popen(
            [
                chromium(),
                "--headless=new",
                "--remote-debugging-pipe",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
                "--no-first-run",
                "--disable-background-networking",
                f"--user-data-dir={self._folder.name}",
                "about:blank",
            ],
            close_fds=False,
            preexec_fn=wire,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._numbers = itertools.count(1)
        self._rest = b""
        self.events: list[dict[str, Any]] = []
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        self._folder.cleanup()

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and return its result; events on the way are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._in, 1 << 20)
            if not more:
                raise RuntimeError(f"the browser ended, status {self._process.poll()}")
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(first)
        return answer

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> "Tab":
        """Open a file in a new tab of a given size and colour scheme, and wait until it is loaded."""
        return Tab(self, path, width, height, dark)


class Tab:
    """One page, with what it asked for and what it complained of."""

    def __init__(self, browser: Browser, path: Path, width: int, height: int, dark: bool) -> None:
        self._browser = browser
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.until("document.readyState === 'complete' && location.protocol === 'file:'")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol on this page."""
        return self._browser.send(method, self._session, **params)

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; promises are awaited."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']['exception']['description']}")
        return answer["result"].get("value")

    def until(self, condition: str, seconds: float = 120.0) -> None:
        """Wait until a JavaScript condition holds."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"after {seconds} s still not: {condition}")
            self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 10)))")

    def click(self, selector: str) -> None:
        """Click the middle of the first element that matches, with a real mouse event."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, times: int = 1) -> None:
        """Press a key: Tab, Enter, Space, ArrowDown, or a letter."""
        codes = {"Tab": 9, "Enter": 13, "Space": 32, "ArrowDown": 40, "ArrowUp": 38}
        text = {"Enter": "\r", "Space": " "}.get(key)
        name = " " if key == "Space" else key
        for _ in range(times):
            about = {"key": name, "code": key, "windowsVirtualKeyCode": codes[key]}
            self.send("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
            self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def requests(self) -> list[str]:
        """Return the URLs that the page asked for, itself and data URIs left out."""
        asked = [event["params"]["request"]["url"] for event in self._mine("Network.requestWillBeSent")]
        return [url for url in asked if not url.startswith("data:") and url != self.run("location.href.split('#')[0]")]

    def complaints(self) -> list[str]:
        """Return errors and warnings of the console, exceptions, and refusals by the content security policy."""
        found = [e["params"]["entry"]["text"] for e in self._mine("Log.entryAdded")]
        found += [str(e["params"]["args"]) for e in self._mine("Runtime.consoleAPICalled")]
        found += [str(e["params"]["exceptionDetails"]) for e in self._mine("Runtime.exceptionThrown")]
        return found

    def _mine(self, method: str) -> list[dict[str, Any]]:
        self.run("0")  # what happened so far is read with the answer
        mine = self._session
        return [e for e in self._browser.events if e.get("method") == method and e.get("sessionId") == mine]

    def overflow(self) -> float:
        """Return by how many pixels the page is wider than the window."""
        return self.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Save what is seen as PNG, or the whole page."""
        if whole:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16000), "scale": 1}
            answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        else:
            answer = self.send("Page.captureScreenshot", format="png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(answer["data"]))
