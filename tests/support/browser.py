"""Headless Chromium as Debian has it (packages chromium, chromium-driver), driven by selenium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
MISSING = "no Chromium here: apt-get install chromium chromium-driver"
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
)


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """Yields a selenium driver with a fresh profile in that folder."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))  # without its downloader
    try:
        yield driver
    finally:
        driver.quit()


def wait_for(driver: Any, seconds: float, *texts: str) -> str:
    """Returns the page's text as soon as it holds all of these. Raises AssertionError."""
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def body(page: Any) -> str:
        return str(page.find_element(By.TAG_NAME, "body").text)

    try:
        WebDriverWait(driver, seconds, ignored_exceptions=[Exception]).until(
            lambda page: all(text in body(page) for text in texts)
        )
    except TimeoutException as error:
        raise AssertionError(f"expected {texts}, the page says:\n{body(driver)}") from error
    return body(driver)
