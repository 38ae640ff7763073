"""The page in a real browser."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from moetor.server.page import page_text
from server.server_process import KEY, ServerProcess

pytest.importorskip("selenium", reason="selenium, which drives the browser, is not installed")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
in_browser = pytest.mark.skipif(
    not BROWSER or not DRIVER, reason="chromium and chromedriver are not installed"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
MAP = "const c = document.getElementById('map'); return c.width > 9 ? c.toDataURL() : ''"
WATCH = """
window.said = [];
new MutationObserver(() => {
  const turn = document.querySelector('.turn.assistant');
  if (turn && turn.textContent && turn.textContent !== window.said.at(-1))
    window.said.push(turn.textContent);
}).observe(document.getElementById('log'), {childList: true, subtree: true, characterData: true});
"""
SILENT = """
window.silent = true;
const asked = window.fetch;
window.fetch = async (...words) => {
  const reply = await asked(...words);
  if (!window.silent || !String(words[0]).endsWith("stats")) return reply;
  const told = await reply.json();
  return new Response(JSON.stringify({...told, healthy: false, layers: []}));
};
"""


def test_the_page_is_whole_and_asks_no_other_host(server: ServerProcess) -> None:
    answer = httpx.get(f"{server.url}/")
    assert answer.status_code == 200
    assert answer.text == page_text()
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert not re.search(r"https?://|@import|<script src|<link [^>]*href=\"(?!data:)", answer.text)


@pytest.fixture(params=[(1280, 900, False), (390, 844, True)], ids=["desk", "phone"])
def browser(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    width, height, dark = request.param
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path}/profile"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    made.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": dark},
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    made.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    yield made
    made.quit()


@in_browser
def test_a_prompt_streams_and_the_map_changes(browser: Any, server: ServerProcess) -> None:
    wait = WebDriverWait(browser, 60, poll_frequency=0.05)
    browser.get(server.url + "/")
    wait.until(lambda b: b.find_element(By.ID, "ask").is_displayed())
    browser.find_element(By.ID, "key").send_keys(KEY + Keys.ENTER)
    wait.until(lambda b: b.find_element(By.ID, "health").text == "running")
    assert browser.find_element(By.ID, "model").text == "demo"
    assert "native" in browser.find_element(By.ID, "blocks").text or "torch" in (
        browser.find_element(By.ID, "blocks").text
    )
    # Of the last seconds: since the page was opened nothing was asked.
    Select(browser.find_element(By.ID, "span")).select_by_value("10")
    wait.until(lambda b: b.execute_script(MAP))
    before = browser.execute_script(MAP)

    browser.execute_script(WATCH)
    heat = browser.find_element(By.ID, "heat")
    heat.clear()
    heat.send_keys("0")
    browser.find_element(By.ID, "prompt").send_keys("Who is there?" + Keys.ENTER)
    wait.until(lambda b: b.find_element(By.ID, "speed").text)
    said = browser.execute_script("return window.said")
    asked = {"messages": [{"role": "user", "content": "Who is there?"}], "temperature": 0}
    key = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", json={**asked, "max_tokens": 128}, headers=key
    )
    assert said[-1] == answer.json()["choices"][0]["message"]["content"]
    assert len(said) > 2
    assert all(said[-1].startswith(text) for text in said)
    wait.until(lambda b: b.execute_script(MAP) != before)

    picture = browser.find_element(By.ID, "map")
    picture.send_keys(Keys.ARROW_DOWN)
    picture.send_keys(Keys.ARROW_RIGHT)
    told = browser.find_element(By.ID, "cell").text
    assert re.search(r"expert 1: \d+ tokens", told), told
    assert browser.execute_script(
        "return document.documentElement.scrollWidth <= window.innerWidth"
    ), "the page is wider than the screen"
    folder = os.environ.get("MOETOR_SCREENSHOTS")
    if folder:
        width = browser.execute_script("return window.innerWidth")
        browser.save_screenshot(str(Path(folder) / f"page-{width}.png"))
        browser.execute_script("window.scrollTo(0, 700)")
        browser.save_screenshot(str(Path(folder) / f"page-{width}-below.png"))
    # The key was asked for with a 401, which the browser notes on its own.
    wrong = [entry for entry in browser.get_log("browser") if "401" not in entry["message"]]
    assert not wrong


@in_browser
def test_stop_and_errors(browser: Any, server: ServerProcess) -> None:
    wait = WebDriverWait(browser, 60, poll_frequency=0.05)
    browser.get(server.url + "/")
    wait.until(lambda b: b.find_element(By.ID, "ask").is_displayed())
    browser.find_element(By.ID, "key").send_keys(KEY + Keys.ENTER)
    wait.until(lambda b: b.find_element(By.ID, "health").text == "running")
    box, tokens = browser.find_element(By.ID, "prompt"), browser.find_element(By.ID, "tokens")
    tokens.clear()
    tokens.send_keys("5000")
    box.send_keys("To be" + Keys.ENTER)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".turn.error"))
    assert "maximum context length" in browser.find_element(By.CSS_SELECTOR, ".turn.error").text
    tokens.clear()
    tokens.send_keys("900")
    box.send_keys("To be" + Keys.ENTER)
    wait.until(lambda b: any(t.text for t in b.find_elements(By.CSS_SELECTOR, ".turn.assistant")))
    box.send_keys(Keys.ESCAPE)
    wait.until(lambda b: b.find_element(By.ID, "send").text == "Send")
    server.idle()

    # An engine that does not answer tells nothing of its experts, until it goes on.
    wait.until(lambda b: b.execute_script(MAP))
    Select(browser.find_element(By.ID, "span")).select_by_value("10")
    browser.execute_script(SILENT)
    wait.until(lambda b: b.find_element(By.ID, "health").text == "takes no requests")
    assert browser.execute_script(MAP), "the map is gone"
    browser.execute_script("samples = samples.slice(-1); samples[0].layers = []; silent = false;")
    wait.until(lambda b: b.find_element(By.ID, "health").text == "running")
    assert browser.execute_script(MAP)
