"""A headless Chromium without a network, for the tests of pages in `.ci/report`."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE_MS = 10_000


def find_chromium() -> str | None:
    """The browser of this machine, or the one that $CHROMIUM names."""
    return os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page in a headless Chromium, over its debugging pipe; what it says on its console is kept."""

    def __init__(self, writing: int, reading: int) -> None:
        self._writing, self._reading = os.fdopen(writing, "wb"), os.fdopen(reading, "rb")
        self._number, self._rest = 0, b""
        self.console: list[str] = []
        self._session: str | None = None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        self._ask("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def _ask(self, method: str, **given: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": given}
        if self._session:
            message["sessionId"] = self._session
        self._writing.write(json.dumps(message).encode() + b"\0")
        self._writing.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                found: dict[str, Any] = answer["result"]
                return found
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._reading.fileno(), 1 << 20)
            assert more, "the browser is gone"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        kind, held = event.get("method", ""), event.get("params", {})
        if kind in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.console.append(json.dumps(held)[:600])
        elif kind == "Network.requestWillBeSent" and not held["request"]["url"].startswith(
            ("file:", "data:", "about:")
        ):
            self.console.append(f"asks for {held['request']['url']}")

    def open(self, page: Path, width: int, height: int = 900, *, dark: bool = False) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._ask("Emulation.setEmulatedMedia", features=scheme)
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self._ask("Page.navigate", url=page.absolute().as_uri())
        ready = "document.readyState === 'complete' && !!document.getElementById('count')?.textContent"
        for _ in range(PATIENCE_MS // 20):
            if self.run(f"new Promise((done) => setTimeout(() => done({ready}), 20))"):
                return
        raise AssertionError(f"{page} is not drawn after {PATIENCE_MS} ms: {self.console}")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; that of a promise once it is kept."""
        found = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)

    def click(self, selector: str, across: float = 0.5) -> None:
        """Click on an element, so far across it."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            f" return [r.x + r.width * {across}, r.y + r.height / 2]; }})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, output: Path) -> None:
        size = self._ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self._ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        output.write_bytes(base64.b64decode(shot["data"]))

    def print(self, output: Path) -> None:
        output.write_bytes(base64.b64decode(self._ask("Page.printToPDF")["data"]))


@contextmanager
def browsing(chromium: str) -> Iterator[Browser]:
    """A browser with a profile of its own, gone in the end."""
    its_input, writing = os.pipe()
    reading, its_output = os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *("bash", "-c", f'exec "$@" 3<&{its_input} 4>&{its_output}', "bash", chromium, "--headless=new"),
            *(
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--no-first-run",
                "--disable-background-networking",
            ),
            *("--remote-debugging-pipe", f"--user-data-dir={profile}"),
        ]
        process = subprocess.Popen(command, pass_fds=(its_input, its_output), stderr=subprocess.DEVNULL)
        os.close(its_input)
        os.close(its_output)
        try:
            yield Browser(writing, reading)
        finally:
            process.terminate()
            process.wait(20)
