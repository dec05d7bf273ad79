"""A real browser: Debian's Chromium without a window, spoken to in its DevTools protocol over two pipes.

Source: Chrome DevTools Protocol; ``--remote-debugging-pipe``: JSON messages, each ended by NUL, requests on descriptor 3, answers on 4.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest


def program() -> str:
    """The browser's path; skips where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no Chromium here (Debian: chromium; CI has it)")


class Browser:
    """One browser with one page.

    Attributes:
        events: (method, parameters) of what it told by itself: console messages, exceptions, requests.
    """

    def __init__(self, profile: Path, *options: str) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._ids = itertools.count(1)
        self._rest = b""
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        words = [
            program(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
            "--remote-debugging-pipe", f"--user-data-dir={profile}", *options, "about:blank",
        ]  # fmt: skip

        def arrange() -> None:
            low, high = os.dup(to_read), os.dup(to_write)  # neither is 3 or 4: those are taken by the pipes' other ends
            os.dup2(low, 3)
            os.dup2(high, 4)

        environment = {
            **os.environ,
            "HOME": str(profile),
            "XDG_CONFIG_HOME": str(profile),
            "XDG_CACHE_HOME": str(profile),
        }
        self._log = open(profile.parent / "browser.log", "wb")  # noqa: SIM115  closed by close()
        self.process = subprocess.Popen(
            words, preexec_fn=arrange, pass_fds=(3, 4), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            env=environment,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        """End it."""
        os.close(self._write)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(60)
        os.close(self._read)
        self._log.close()

    # -- the protocol -----------------------------------------------------------------------------

    def _message(self, seconds: float) -> dict[str, Any] | None:
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                return None
            data = os.read(self._read, 1 << 20)
            if not data:
                pytest.fail("the browser ended")
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def _ask(self, method: str, *, session: str = "", **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._message(120)
            if answer is None:
                pytest.fail(f"the browser does not answer {method}")
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command to the page."""
        return self._ask(method, session=self._session, **parameters)

    # -- what a person does -----------------------------------------------------------------------

    def go(self, address: str) -> None:
        """Open a page."""
        found = self.ask("Page.navigate", url=address)
        assert "errorText" not in found, found

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        found = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 60.0) -> Any:
        """The first true value of an expression; fails after a long time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.js(expression)
            if value:
                return value
            self._message(0.1)
        pytest.fail(
            f"waited for {expression}; the page: {self.js('document.body.innerText')[:3000]}; {self.complaints()}"
        )

    def press(self, key: str, code: str = "", number: int = 0, text: str = "") -> None:
        """Press a key."""
        told = {"key": key, "code": code or key, "windowsVirtualKeyCode": number, **({"text": text} if text else {})}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **told)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **told)

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window, and the colours that the person prefers."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a picture of the page."""
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self) -> list[str]:
        """Exceptions, errors on the console, and what the Content Security Policy refused."""
        found = []
        for method, told in self.events:
            if method == "Runtime.exceptionThrown":
                details = told["exceptionDetails"]
                found.append(details.get("exception", {}).get("description") or details["text"])
            elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
                found.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
            elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning"):
                found.append(str(told["args"]))
        return found

    def requested(self) -> set[str]:
        """Addresses that pages asked for."""
        return {told["request"]["url"] for method, told in self.events if method == "Network.requestWillBeSent"}
