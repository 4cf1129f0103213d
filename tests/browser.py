"""A headless Chromium for tests, driven through its DevTools protocol over two pipes."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT = 120  # seconds for an answer


def find_browser() -> str | None:
    """Return the path of a Chromium, or None."""
    given = os.environ.get("TRAINKIT_BROWSER", "")
    return next((path for name in (given, *NAMES) if name and (path := shutil.which(name))), None)


class Browser:
    """A browser with one page.

    Args:
        program: the path of a Chromium.
        profile: an empty folder.

    Attributes:
        requests: the addresses that were requested.
        problems: failed requests, errors of scripts, and messages of the console.
    """

    def __init__(self, program: str, profile: Path) -> None:
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.loaded = False
        self.last_id = 0
        self.buffer = b""
        commands, self.commands = os.pipe()  # the browser reads commands from 3 and writes answers to 4
        self.answers, answers = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        words = [program, *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        # A shell sets the numbers of the pipes: subprocess passes descriptors on only with their own numbers.
        script = f'exec 3<&{commands} 4>&{answers}; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *words],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        target = self.call("Target.createTarget", {"url": "about:blank"}, session=None)["targetId"]
        attached = self.call("Target.attachToTarget", {"targetId": target, "flatten": True}, session=None)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, parameters: dict[str, Any] | None = None, session: str | None = "") -> dict[str, Any]:
        """Call a method of the protocol and return its result; see its events."""
        self.last_id += 1
        message: dict[str, Any] = {"id": self.last_id, "method": method, "params": parameters or {}}
        if session is not None:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, address: str) -> None:
        """Open an address and wait until it has loaded."""
        self.loaded = False
        self.requests.clear()
        self.problems.clear()
        self.call("Page.navigate", {"url": address})
        while not self.loaded:
            self._read()

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        given = {"expression": script, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", given)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def emulate(self, *, width: int = 1200, height: int = 900, dark: bool = False, media: str = "") -> None:
        """Set the size of the window, the colour scheme and the medium (`print`)."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page as PNG."""
        answer = self.call("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self) -> bytes:
        """Return the printed page as PDF."""
        return base64.b64decode(self.call("Page.printToPDF", {"printBackground": True})["data"])

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)

    def _read(self) -> dict[str, Any]:
        """Return the next message of the browser, and record what it says about the page."""
        end = time.monotonic() + TIMEOUT
        while b"\0" not in self.buffer:
            assert select.select([self.answers], [], [], max(0, end - time.monotonic()))[0], "no answer of the browser"
            chunk = os.read(self.answers, 2**20)
            assert chunk, f"the browser has ended with exit code {self.process.wait()}"
            self.buffer += chunk
        text, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._record(message.get("method", ""), message.get("params", {}))
        return message

    def _record(self, method: str, event: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method in (
            "Network.loadingFailed",
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
        ):
            self.problems.append(f"{method}: {json.dumps(event)}")
