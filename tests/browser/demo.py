"""Tries the demo in a real browser: generates, uploads, slides and swaps, at the width of a desk and of a phone.

    pip install selenium        # and Debian's chromium and chromium-driver, or Chrome and its driver
    python tests/browser/demo.py RUN [--out FOLDER]

RUN is a pipeline whose tokenizer reads pictures, such as quickstart/generator. Screenshots go to FOLDER. pytest does
not collect this file: it needs a browser.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from vistok.demo import launched

WIDTHS = {"desk": 1200, "phone": 390}
PATIENCE = 60
"""Seconds that a step may take."""
BEYOND = """
return [...document.querySelectorAll('*')].filter(element => element.getBoundingClientRect().right > arguments[0] + 1)
  .map(element => `${element.tagName}.${element.className}`).slice(-6)
"""
"""The elements that end off-screen, the innermost ones last."""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--out", type=Path, default=Path("screenshots"))
    parser.add_argument("--width", choices=WIDTHS, help="one of the widths; both by default")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with launched([arguments.run], device="cpu") as app, tempfile.TemporaryDirectory() as folder:
        for name, width in WIDTHS.items():
            if arguments.width not in (None, name):
                continue
            browser = Browser(width, Path(folder) / name)
            try:
                visit(browser, app.local_url, Path(folder), arguments.out / name)
            finally:
                browser.quit()
            print(f"{name} ({width} px): all steps worked")


class Browser:
    """Chromium of one width."""

    def __init__(self, width: int, profile: Path):
        options = webdriver.ChromeOptions()
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.binary_location = shutil.which("chromium") or ""
        driver = shutil.which("chromedriver")  # named, so that Selenium looks for none on a network
        self.driver, self.width = webdriver.Chrome(options, Service(driver)), width
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def quit(self) -> None:
        self.driver.quit()

    def wait(self, condition, what: str):
        return WebDriverWait(self.driver, PATIENCE).until(lambda _: condition(), f"waited in vain for {what}")

    def one(self, selector: str, text: str = "") -> WebElement:
        """The first visible element of a CSS selector that has the text."""

        def find():
            found = self.driver.find_elements(By.CSS_SELECTOR, selector)
            return next((element for element in found if element.is_displayed() and text in element.text), None)

        return self.wait(find, f"{selector} with {text!r}")

    def press(self, text: str, selector: str = "button") -> None:
        element = self.one(selector, text)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", element)

    def check_width(self, where: str) -> None:
        """Nothing may begin or end off-screen."""
        wide = self.driver.execute_script("return document.documentElement.scrollWidth")
        if wide > self.width:
            beyond = self.driver.execute_script(BEYOND, self.width)
            raise AssertionError(f"{where}: the page is {wide} px wide on a screen of {self.width}, by {beyond}")

    def shoot(self, path: Path) -> None:
        height = min(4000, self.driver.execute_script("return document.documentElement.scrollHeight"))
        size = {"width": self.width, "height": max(height, 900), "deviceScaleFactor": 1, "mobile": self.width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        time.sleep(1)
        self.driver.save_screenshot(str(path))


def visit(browser: Browser, address: str, folder: Path, out: Path) -> None:
    """The whole tour; every step waits for what it should show."""
    browser.driver.get(address)
    browser.press("Generate", "button.primary")
    browser.wait(lambda: finished(browser), "the last token")
    browser.one(".vt-picture")
    browser.check_width("Generate")
    browser.shoot(out.with_name(f"{out.name}-generate.png"))

    browser.press("Reconstruct", "button[role=tab]")
    size = 200
    ramp = np.linspace(0, 255, size)[None].repeat(size, 0)
    Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], -1).astype(np.uint8)).save(folder / "mine.png")
    browser.wait(lambda: browser.driver.find_elements(By.CSS_SELECTOR, "input[type=file]"), "the upload")
    browser.driver.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(folder / "mine.png"))
    slider = browser.one(".vt-compare input[type=range]")
    browser.driver.execute_script(
        "arguments[0].value = 80; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))", slider
    )
    at = browser.driver.execute_script("return arguments[0].parentNode.style.getPropertyValue('--at')", slider)
    assert at == "80%", f"the border between before and after stayed at {at}"
    browser.one("figcaption", "PSNR")
    browser.check_width("Reconstruct")
    browser.shoot(out.with_name(f"{out.name}-reconstruct.png"))

    if not browser.driver.find_elements(By.XPATH, "//button[@role='tab'][contains(., 'Tokens')]"):
        return
    browser.press("Tokens", "button[role=tab]")
    browser.press("Show the tokens")
    browser.one("figcaption", "different ids")
    browser.press("Another id at random")
    browser.one("figcaption", "what changed")
    browser.check_width("Tokens")
    browser.shoot(out.with_name(f"{out.name}-tokens.png"))


def finished(browser: Browser) -> bool:
    """Whether a note says "16 of 16 tokens"."""
    notes = [element.text for element in browser.driver.find_elements(By.CSS_SELECTOR, ".vt-note")]
    counts = [match.groups() for text in notes if (match := re.fullmatch(r"(\d+) of (\d+) tokens", text))]
    return any(done == total for done, total in counts)


if __name__ == "__main__":
    main()
