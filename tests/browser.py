"""A headless Chromium that opens HTML files, and what a good page has: no errors, no overflow, accessible."""

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

AXE = Path(__file__).resolve().parent / "serving" / "node_modules" / "axe-core" / "axe.min.js"
WIDTHS = (1280, 390)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
_OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars",
)  # fmt: skip
_RULES = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]}}


class Browser:
    """Chromium, driven by selenium."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, path: Path, *, width: int = 1280, scheme: Literal["light", "dark"] = "light") -> None:
        """Open a file in a window of this width, in a color scheme."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get(path.resolve().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """Return the value of a function body in JavaScript."""
        return self.driver.execute_script(script, *arguments)

    def errors(self) -> list[str]:
        """Return what the console has logged since the last call, without what is below a warning."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def overflow(self) -> list[str]:
        """Return the elements that make the page wider than the window."""
        return self.run(
            "const width = document.documentElement.clientWidth;"
            "if (document.documentElement.scrollWidth <= width) return [];"
            "return [...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > width + 1)"
            ".map((e) => e.outerHTML.slice(0, 120)).concat(['the page']);"
        )

    def violations(self) -> list[str]:
        """Return what axe-core finds: rule, and the first elements."""
        self.run(AXE.read_text(encoding="utf-8"))
        result = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1]; axe.run(document, JSON.parse(arguments[0])).then(done);",
            json.dumps(_RULES),
        )
        return [
            f"{rule['id']}: {rule['help']}: {[node['html'][:160] for node in rule['nodes'][:3]]}"
            for rule in result["violations"]
        ]

    def screenshot(self, path: Path, *, full: bool = True) -> None:
        """Write a picture of the page, or of its first screen, as PNG."""
        data = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": full, **self._clip(full)}
        )
        path.write_bytes(base64.b64decode(data["data"]))

    def _clip(self, full: bool) -> dict[str, Any]:
        width, height = self.run("return [document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        return {"clip": {"x": 0, "y": 0, "width": width, "height": height if full else 900, "scale": 1}}


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile in a folder; skip the test without Chromium or axe-core."""
    binary = shutil.which("chromium")
    service = shutil.which("chromedriver")
    if binary is None or service is None or not AXE.is_file():
        pytest.skip("this test needs Debian's chromium and chromium-driver, and npm install --prefix tests/serving")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in (*_OPTIONS, f"--user-data-dir={folder}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    os.environ.setdefault("SE_AVOID_STATS", "true")
    driver = webdriver.Chrome(options=options, service=Service(service))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
