"""Drives headless Chromium with its DevTools protocol: opens pages, evaluates JavaScript in them,
takes screenshots.

The protocol runs over a pair of pipes (--remote-debugging-pipe: JSON messages, each followed by a
zero byte), so only the browser has to be installed.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
_FLAGS = "--headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run"
_PATIENCE = 30.0
"""Seconds."""


class Tab:
    """A browser tab. `errors` collects its uncaught exceptions and failed loads."""

    def __init__(self, to_browser: int, from_browser: int):
        self.to_browser, self.from_browser = to_browser, from_browser
        self.received = b""
        self.count = 0
        self.errors: list[dict] = []
        self.session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        """Send a command and return its result; see chromedevtools.github.io/devtools-protocol."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params, **self.session}
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            failed = answer.get("method") in ("Runtime.exceptionThrown", "Network.loadingFailed")
            # Leaving a page aborts its unfinished loads, which is not an error.
            if failed and answer["params"].get("errorText") != "net::ERR_ABORTED":
                self.errors.append(answer["params"])
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self.received:
            assert select.select([self.from_browser], [], [], _PATIENCE)[0], "no answer"
            chunk = os.read(self.from_browser, 1 << 20)
            assert chunk, "the browser has ended"
            self.received += chunk
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def open(self, place: Path | str) -> None:
        """Load a file or address and wait until everything in it is loaded."""
        url = place if isinstance(place, str) else place.resolve().as_uri()
        self.call("Page.navigate", url=url)
        self.wait("location.protocol != 'about:' && document.readyState == 'complete'")

    def run(self, script: str):
        """Evaluate a JavaScript expression and return its value."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.time() + _PATIENCE
        while not self.run(condition):
            assert time.time() < deadline, f"never became true: {condition}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
        return path


@contextmanager
def open_browser(profile: Path, width: int = 1400, height: int = 1000) -> Iterator[Tab]:
    """A `Tab` in a new browser, which is closed afterwards. `profile`: an empty folder for it."""
    read_commands, to_browser = os.pipe()
    from_browser, write_answers = os.pipe()
    ends = (read_commands, write_answers)
    # The browser expects its ends of the pipes as file descriptors 3 and 4.
    script = "import os, sys; [os.dup2(int(sys.argv[i]), 2 + i) for i in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])"
    command = [sys.executable, "-c", script, *map(str, ends), CHROMIUM, *_FLAGS.split()]
    command += [f"--user-data-dir={profile}", f"--window-size={width},{height}"]
    command += ["--remote-debugging-pipe", "about:blank"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, pass_fds=ends)
    for end in ends:
        os.close(end)
    try:
        yield Tab(to_browser, from_browser)
    finally:
        process.terminate()
        process.wait(timeout=_PATIENCE)
        os.close(to_browser)
        os.close(from_browser)


# -- JavaScript that tests share -------------------------------------------------------------------
WIDTH = "document.documentElement.scrollWidth"


def seen(selector: str, of: str) -> str:
    """JavaScript: the value of the expression `of` for every visible element `e`, as a list."""
    seen = f"[...document.querySelectorAll({selector!r})].filter(e => e.offsetParent)"
    return f"{seen}.map(e => {of})"


def type_in(selector: str, value: str, number: int = 0) -> str:
    """JavaScript: set a field's value and send the event that typing would send."""
    return (
        f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('input')) }})"
        f"(document.querySelectorAll({selector!r})[{number}])"
    )


def click(selector: str, number: int = 0) -> str:
    return f"document.querySelectorAll({selector!r})[{number}].click()"


def text(selector: str) -> str:
    return f"document.querySelector({selector!r}).textContent"


@contextmanager
def phone_in_the_dark(page: Tab) -> Iterator[None]:
    """Emulate a narrow screen in dark mode; asserts that the page fits and is dark."""
    screen = {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.call("Emulation.setDeviceMetricsOverride", **screen)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.call("Emulation.setEmulatedMedia", features=dark)
    try:
        assert page.run(WIDTH) <= 375
        ground = page.run("getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(23, 24, 26)"
        yield
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")
        page.call("Emulation.setEmulatedMedia", features=[])
