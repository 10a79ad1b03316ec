"""Just enough WebDriver over HTTP to drive a headless Chromium: no dependency, no network."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Shift": "\ue008", "Control": "\ue009"} | {
    "Escape": "\ue00c", "Home": "\ue011", "ArrowLeft": "\ue012", "ArrowUp": "\ue013",
    "ArrowRight": "\ue014", "ArrowDown": "\ue015",
}  # fmt: skip
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


def missing() -> str | None:
    """Why no browser can be driven here, or None."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"needs {program}: apt-get install chromium chromium-driver"
    return None


class Browser:
    """One session with its own driver and an empty profile in `home`."""

    def __init__(self, home: Path, *, size: tuple[int, int] = (1400, 900), script: bool = True):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._base = f"http://127.0.0.1:{port}"
        driver = shutil.which("chromedriver")
        assert driver is not None
        with (home / "chromedriver.log").open("wb") as log:
            self._driver = subprocess.Popen([driver, f"--port={port}"], stdout=log, stderr=log)
        flags = [*FLAGS, f"--user-data-dir={home / 'profile'}", "--window-size={},{}".format(*size)]
        options: dict[str, Any] = {"args": flags, "binary": shutil.which("chromium")}
        if not script:
            options["prefs"] = {"profile.managed_default_content_settings.javascript": 2}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            self._await_driver()
            made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self._driver.kill()
            self._driver.wait()
            raise
        self._base += f"/session/{made['sessionId']}"

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(timeout=20)

    def _await_driver(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                if self._call("GET", "/status")["ready"]:
                    return
            except (urllib.error.URLError, ConnectionError):
                if time.monotonic() > deadline or self._driver.poll() is not None:
                    raise
            time.sleep(0.05)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._base + path, data=data, method=method)  # noqa: S310
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, page: Path) -> None:
        self._call("POST", "/url", {"url": page.as_uri()})

    def run(self, script: str, *args: object) -> Any:
        return self._call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def devtools(self, command: str, **params: object) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def find(self, selector: str) -> dict[str, str]:
        found: dict[str, str] = self._call(
            "POST", "/element", {"using": "css selector", "value": selector}
        )
        return found

    def click(self, element: dict[str, str]) -> None:
        button = {"button": 0}
        over = {"type": "pointerMove", "x": 0, "y": 0, "origin": element}
        self._pointer(over, {"type": "pointerDown"} | button, {"type": "pointerUp"} | button)

    def hover(self, element: dict[str, str]) -> None:
        self._pointer({"type": "pointerMove", "x": 0, "y": 0, "origin": element})

    def _pointer(self, *actions: dict[str, Any]) -> None:
        mouse = {"type": "pointer", "id": "mouse", "actions": list(actions)}
        self._call("POST", "/actions", {"actions": [mouse]})

    def press(self, *keys: str) -> None:
        """Press keys together: `press("Control", "f")`."""
        held = [KEYS.get(key, key) for key in keys]
        actions = [{"type": "keyDown", "value": key} for key in held]
        actions += [{"type": "keyUp", "value": key} for key in reversed(held)]
        self._call(
            "POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]}
        )

    def write(self, text: str) -> None:
        for char in text:
            self.press(char)

    def console(self) -> list[str]:
        """What the console was told since the last call."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries]

    def prefer(self, scheme: str) -> None:
        """Emulate prefers-color-scheme: "light" or "dark"."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self) -> bytes:
        return base64.b64decode(self._call("GET", "/screenshot"))
