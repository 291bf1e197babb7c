"""A headless Chromium, driven over WebDriver, which is JSON over HTTP and needs no package."""

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# WebDriver's keys, and its key of an element in JSON.
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Shift": "\ue008", "Tab": "\ue004"}
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--lang=en-GB",
)


class Browser:
    """A session of a browser."""

    def __init__(self, port: int, options: dict[str, Any]) -> None:
        self._port, self._session = port, ""
        always = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        found = self._call("POST", "/session", {"capabilities": {"alwaysMatch": always}})
        self._session = f"/session/{found['sessionId']}"

    def _call(self, method: str, path: str, value: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        with contextlib.closing(connection):
            body = None if method == "GET" else json.dumps(value or {})
            connection.request(method, self._session + path, body, {"content-type": "application/json"})
            found = json.loads(connection.getresponse().read())["value"]
        if isinstance(found, dict) and "error" in found:
            raise AssertionError(f"{path}: {found['error']}: {found['message'].splitlines()[0]}")
        return found

    def open(self, url: str) -> None:
        """Open a page; it must have read its models."""
        self._call("POST", "/url", {"url": url})

    def reload(self) -> None:
        """Load the page again."""
        self._call("POST", "/refresh")

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript, and return its value; a promise is awaited."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def element(self, selector: str) -> str:
        """Return the WebDriver path of the first visible element."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].find((e) => e.checkVisibility()) ?? null"
        )
        found = self.wait(lambda: self.run(script, selector), selector)
        return f"/element/{found[_ELEMENT]}"

    def click(self, selector: str) -> None:
        """Click the first visible element."""
        self._call("POST", f"{self.element(selector)}/click")

    def type(self, selector: str, text: str, *, clear: bool = False) -> None:
        """Type a text; keys are written as ``{Enter}``."""
        path = self.element(selector)
        if clear:
            self._call("POST", f"{path}/clear")
        self._call("POST", f"{path}/value", {"text": keys(text)})

    def press(self, key: str) -> None:
        """Press a key wherever the focus is."""
        steps = [{"type": kind, "value": KEYS[key]} for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": steps}]})

    def text(self, selector: str) -> str:
        """Return the text of the last element, as it is in the document."""
        return str(
            self.run(
                "return [...document.querySelectorAll(arguments[0])].at(-1)?.textContent ?? ''", selector
            )
        )

    def count(self, selector: str) -> int:
        """Return the number of visible elements."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility()).length"
        )
        return int(self.run(script, selector))

    def wait(self, condition: Callable[[], Any], what: str = "", seconds: float = 90) -> Any:
        """Return the condition's value once it is true."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, (
                f"waited in vain for {what}: {self.run('return document.body.innerText')}"
            )
            time.sleep(0.05)
        return value

    def console(self) -> list[str]:
        """Return the warnings and errors of the console since the last call."""
        records = self._call("POST", "/se/log", {"type": "browser"})
        return [record["message"] for record in records if record["level"] in ("WARNING", "SEVERE")]

    def devtools(self, command: str, **parameters: Any) -> None:
        """Send a command of the DevTools protocol."""
        self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def resize(self, width: int, height: int) -> None:
        """Change the size of the page."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def screenshot(self, path: Path) -> None:
        """Save a picture of the page."""
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def close(self) -> None:
        """End the browser."""
        self._call("DELETE", "")


def keys(text: str) -> str:
    """Return a text with WebDriver's characters for keys."""
    return re.sub(r"\{(\w+)\}", lambda found: KEYS[found[1]], text)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Return a headless Chromium."""
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("chromedriver is missing: apt-get install chromium chromium-driver")
    log = tmp_path_factory.mktemp("browser") / "log"
    flags = [*_FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    options: dict[str, Any] = {"args": [*flags, f"--user-data-dir={log.parent / 'profile'}"]}
    if chromium := shutil.which("chromium"):
        options["binary"] = chromium
    with log.open("w") as file:
        process = subprocess.Popen([driver, "--port=0"], stdout=file, stderr=subprocess.STDOUT)
    try:
        browser = Browser(_port(process, log), options)
        yield browser
        browser.close()
    finally:
        process.terminate()
        process.wait(30)


def _port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    end = time.monotonic() + 60
    while not (found := re.search(r"started successfully on port (\d+)", log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    return int(found[1])
