"""Pages as headless Chromium shows them, over the DevTools protocol on pipes: needs no package and no port."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt-get install chromium")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


@dataclass(frozen=True)
class Seen:
    """A page at one width, in pixels: what the console complained about, and how wide window and content are."""

    complaints: list[str]
    window_width: int
    content_width: int
    png: bytes  # of the whole page


class Browser:
    """One tab; `send` and `wait_for` speak the protocol, a message being JSON that a zero byte ends."""

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        self.commands, self.answers = commands, answers
        self.session: str | None = None
        self.number = 0
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command; events that come first are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.commands.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def wait_for(self, method: str) -> None:
        """Return when this event has come."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "Chromium ended"
            data += byte
        return json.loads(data)

    def look(self, page: Path, width: int) -> Seen:
        """The page in a window of this width."""
        assert page.exists(), page  # Chromium shows a page of its own, without a complaint
        self.events.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url=page.absolute().as_uri())
        self.wait_for("Page.loadEventFired")
        widths = "[innerWidth, document.documentElement.scrollWidth]"
        found = self.send("Runtime.evaluate", expression=widths, returnByValue=True)["result"]["value"]
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": width, "height": min(size["height"], 16_000), "scale": 1}
        shot = self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return Seen(list(complaints(self.events)), *found, base64.b64decode(shot["data"]))


def complaints(events: list[dict[str, Any]]) -> Iterator[str]:
    """The texts of errors and warnings among the events: of scripts, of the console, of files that do not load."""
    for event in events:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            yield params["exceptionDetails"]["exception"].get("description", "")
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            yield " ".join(str(argument.get("value")) for argument in params["args"])
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            yield params["entry"]["text"]


@contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium of its own, gone at the end with its profile."""
    (their_commands, commands), (answers, their_answers) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = [*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        script = f'exec "$@" 3<&{their_commands} 4>&{their_answers}'  # the protocol's pipes are 3 and 4
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", str(CHROMIUM), *arguments],
            pass_fds=(their_commands, their_answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_commands)
        os.close(their_answers)
        try:
            with os.fdopen(commands, "wb", buffering=0) as to_browser, os.fdopen(answers, "rb") as from_browser:
                yield Browser(to_browser, from_browser)
        finally:
            process.terminate()
            process.wait(timeout=60)
