"""A headless Chromium for tests, driven over two pipes by the DevTools protocol: JSON messages that
end with NUL.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Browser:
    """One page; `events` holds all that it reported. Use it in a `with` block."""

    def __enter__(self) -> "Browser":
        self.folder, self.number, self.buffer, self.events = tempfile.mkdtemp(), 0, b"", []
        theirs, self.sent = os.pipe()
        self.received, theirs_too = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4.
        words = [CHROMIUM, *FLAGS, f"--user-data-dir={self.folder}"]
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{theirs_too}', "bash", *words]
        self.process = subprocess.Popen(
            shell, pass_fds=(theirs, theirs_too), stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(theirs_too)
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.sent)
        os.close(self.received)
        shutil.rmtree(self.folder, ignore_errors=True)

    def read(self, seconds: float = 60) -> dict:
        """The next message; events are kept, too."""
        end = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.received], [], [], max(end - time.monotonic(), 0))
            if not ready or not (part := os.read(self.received, 2**16)):
                raise TimeoutError("Chromium says nothing")
            self.buffer += part
        text, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def call(self, method: str, **parameters: object) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.sent, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(
        self, page: Path | str, width: int = 1280, height: int = 900, dark: bool = False
    ) -> None:
        """Load a page afresh in a window of this size; a narrow one is a phone's."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while self.read().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> object:
        """What a JavaScript expression (or promise) gives, as JSON."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, selector: str, across: float = 0.5) -> None:
        """Press and release the mouse on an element, `across` from its left (0) to its right
        (1).
        """
        node = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{node}.scrollIntoView({{block: 'center'}})")
        box = self.value(f"{node}.getBoundingClientRect().toJSON()")
        x, y = box["x"] + across * box["width"], box["y"] + box["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            codes = {"ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
            )

    def complaints(self) -> list[dict]:
        """Errors and messages of scripts, and requests for anything but files and data."""
        bad = (
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
            "Page.javascriptDialogOpening",
        )
        asked = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [e for e in self.events if e["method"] in bad] + [
            e for e in asked if not e["params"]["request"]["url"].startswith(("file:", "data:"))
        ]

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG, for people who work on it."""
        clip = self.call("Page.getLayoutMetrics")["cssContentSize"] | {"scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))
