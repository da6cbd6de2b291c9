"""Chromium without a window, driven through its DevTools pipe: what a page shows, and does when it is used."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs a browser: chromium, chromium-browser or google-chrome"
)

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)
TIMEOUT_S = 60
LOWEST_FREE_FD = 10
"""Above the two that the browser's pipe must have."""
COMPLAINTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening")


class Browser:
    """One tab. The standard library is enough: a message is JSON that ends with a zero byte."""

    def __init__(self, profile: Path) -> None:
        ends = [*os.pipe(), *os.pipe()]
        theirs_in, self._ours_out, self._ours_in, theirs_out = (
            fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, LOWEST_FREE_FD) for fd in ends
        )
        wired = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        words = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", wired, *words],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (*ends, theirs_in, theirs_out):
            os.close(fd)
        self._received = b""
        self._last_id = 0
        self._events: list[dict[str, Any]] = []
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        for fd in (self._ours_in, self._ours_out):
            os.close(fd)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the browser, or the tab once there is one."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._ours_out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._last_id:
            self._events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._ours_in], [], [], max(0, until - time.monotonic()))
            chunk = os.read(self._ours_in, 1 << 20) if ready else b""
            assert chunk, "the browser says nothing any more"
            self._received += chunk
        message, _, self._received = self._received.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def open(self, page: Path, *, width: int = 1280, scripts: bool = True, any_script: bool = False) -> None:
        """Load a page.

        Args:
            scripts: run the page's.
            any_script: also those that its policy forbids.
        """
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Page.setBypassCSP", enabled=any_script)
        self._events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._receive())

    def complaints(self) -> list[str]:
        """Return what was thrown, printed, refused or popped up since the page was opened."""
        self.run("0")
        return [json.dumps(event["params"]) for event in self._events if event["method"] in COMPLAINTS]

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def box(self, element: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of the element of an expression, in the window, after scrolling there."""
        measured = self.run(
            f"(() => {{ const element = {element}; element.scrollIntoView({{block: 'center'}}); "
            "const box = element.getBoundingClientRect(); return [box.left, box.top, box.width, box.height]; })()"
        )
        return measured[0], measured[1], measured[2], measured[3]

    def point(self, element: str, x: float, y: float) -> None:
        """Move the pointer to a place given as shares of the element's sides."""
        self._mouse("mouseMoved", element, x, y)

    def click(self, element: str, x: float = 0.5, y: float = 0.5) -> None:
        """Press and release the pointer there."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._mouse(kind, element, x, y)

    def _mouse(self, kind: str, element: str, x: float, y: float) -> None:
        left, top, width, height = self.box(element)
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=left + x * width, y=top + y * height, **button)

    def press(self, *keys: str) -> None:
        """Type keys, named as JavaScript names them."""
        for key in keys:
            for kind in ("rawKeyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def look(self, element: str) -> NDArray[np.uint8]:
        """Return an element's pixels as they are drawn: [height, width, 3]."""
        left, top, width, height = self.box(element)
        across, down = self.run("[scrollX, scrollY]")
        clip = {"x": left + across, "y": top + down, "width": width, "height": height, "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", clip=clip)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
