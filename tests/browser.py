"""Headless Chromium over its DevTools pipe: no driver, no port, nothing to install but the browser.

Messages are JSON, each ended by a zero byte; the browser reads file descriptor 3 and writes 4.
"""
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from base64 import b64decode

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. Use it in a `with`; `requests` are the addresses that it asked for."""
    def __init__(self, program: str):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (self.its_in, self.to), (self.from_, self.its_out) = os.pipe(), os.pipe()
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                   "--no-first-run", "--remote-debugging-pipe", "--hide-scrollbars",
                   "--disable-background-networking", f"--user-data-dir={self.folder.name}")
        # the shell puts the pipes where the browser looks for them
        script = f'exec "$@" 3<&{self.its_in} 4>&{self.its_out}'
        self.process = subprocess.Popen(["bash", "-c", script, "bash", program, *options],
                                        pass_fds=(self.its_in, self.its_out),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(self.its_in)
        os.close(self.its_out)
        self.buffer, self.number, self.requests, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target,
                                 flatten=True)["sessionId"]
        self.call("Network.enable")
        self.call("Page.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.session = None
            self.call("Browser.close")
            self.process.wait(timeout=20)
        finally:
            self.process.kill()
            os.close(self.to)
            os.close(self.from_)
            self.folder.cleanup()

    def _message(self, deadline: float) -> dict:
        while b"\0" not in self.buffer:
            wait = max(0, deadline - time.monotonic())
            if not select.select([self.from_], [], [], wait)[0]:
                raise TimeoutError("the browser does not answer")
            more = os.read(self.from_, 1 << 16)
            if not more:
                raise ConnectionError(f"the browser ended with {self.process.wait()}")
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        found = json.loads(message)
        if found.get("method") == "Network.requestWillBeSent":
            self.requests.append(found["params"]["request"]["url"])
        return found

    def call(self, method: str, **params) -> dict:
        """Send a command and wait for its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 60
        while True:
            found = self._message(deadline)
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]

    def open(self, url: str, width: int = 1200, height: int = 800, dark: bool = False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.requests.clear()
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + 60
        while self.run("document.readyState") != "complete" or self.run("location.href") != url:
            assert time.monotonic() < deadline, url
            time.sleep(0.02)

    def run(self, script: str):
        """The value of a JavaScript expression; the page's own policy does not bind it."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                          allowUnsafeEvalBlockedByCSP=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def hover(self, selector: str):
        x, y = self.run("(() => { const it = document.querySelector(" + json.dumps(selector) + """);
            it.scrollIntoView({ block: "center" }); const r = it.getClientRects()[0];
            return [r.x + r.width / 2, r.y + r.height / 2] })()""")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def click(self, selector: str):
        x, y = self.hover(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press_tab(self):
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab",
                      windowsVirtualKeyCode=9)

    def screenshot(self, path):
        data = self.call("Page.captureScreenshot", format="png")["data"]
        with open(path, "wb") as file:
            file.write(b64decode(data))
