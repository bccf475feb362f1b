# SPDX-License-Identifier: Apache-2.0
"""The report of an A/B test in headless Chromium: alone, quiet, and of use at every width."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from cna_vllm.evaluation.ab import evaluate, load_metrics
from cna_vllm.evaluation.outcomes import Analysis
from cna_vllm.evaluation.report import write_report
from tests.simulated_ab import ARMS, simulate

SCRIPT = Path(__file__).parents[2] / ".ci" / "browser.sh"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTHS = (390, 1280)
# What a model, or whoever wrote a prompt, may try; and what no page may be wider for.
HOSTILE = (
    "</p></article></script><script>window.pwned = 1</script>"
    "<img src=x onerror='window.pwned = 1'><svg onload='window.pwned = 1'>"
    "<a href='javascript:window.pwned = 1'>{{ 7 * 7 }}</a> needle \u202e\x00 " + "long" * 400
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = {("plain", 0): HOSTILE, ("refusal@0", 3): HOSTILE}
    test, answers, _ = simulate(texts=texts, model="org/tiny-<script>window.pwned = 1</script>")
    metrics = load_metrics(["refusal", "false_refusal", "quality", "length:unit=words"])
    result = evaluate(test, answers, metrics, analysis=Analysis(resamples=199))
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(result, answers, path)
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    found = subprocess.run(
        ["bash", str(SCRIPT), "--check"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.fail(found.stderr.strip(), pytrace=False)
    browser, driver = found.stdout.split()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=Service(driver)) as made:
        yield made


@pytest.fixture
def page(chromium: webdriver.Chrome, report: Path) -> webdriver.Chrome:
    """The report, freshly opened, with empty logs."""
    chromium.get("about:blank")
    for kind in ("browser", "performance"):
        chromium.get_log(kind)
    chromium.get(report.as_uri())
    return chromium


def resize(page: webdriver.Chrome, width: int) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )


def shown(page: webdriver.Chrome) -> list[tuple[int, list[str]]]:
    """Of each transcript that is shown, its number and the arms whose answers are shown."""
    found: list[Any] = page.execute_script(
        """return [...document.querySelectorAll(".transcript")]
          .filter((node) => node.checkVisibility())
          .map((node) => [
            Number(node.querySelector(".index").textContent),
            [...node.querySelectorAll(".card")].filter((card) => card.checkVisibility())
              .map((card) => card.querySelector("h3").textContent),
          ]);"""
    )
    return [(number, arms) for number, arms in found]


def choose(page: webdriver.Chrome, field: str, value: str) -> None:
    """Sets a filter as a person does, by an event that bubbles."""
    page.execute_script(
        """const field = document.getElementById(arguments[0]);
        field.value = arguments[1];
        field.dispatchEvent(new Event("input", {bubbles: true}));""",
        field,
        value,
    )


def test_nothing_from_outside_and_nothing_wrong(page: webdriver.Chrome, report: Path) -> None:
    page.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert report.as_uri() in asked
    assert all(url == report.as_uri() or url.startswith("data:") for url in asked)
    assert page.get_log("browser") == []
    assert page.title.startswith("A/B test of org/tiny-")


def test_what_a_model_writes_stays_text(page: webdriver.Chrome) -> None:
    assert page.execute_script("return window.pwned") is None
    assert page.execute_script("return document.scripts.length") == 1
    answer = page.execute_script("return document.querySelector('.answer').textContent")
    assert answer == HOSTILE.replace("\x00", "\ufffd")
    allowed = page.execute_script(
        """const node = document.createElement("script");
        node.textContent = "window.pwned = 2";
        document.body.append(node);
        return window.pwned;"""
    )
    assert allowed is None  # even inside the page, its policy lets no other script run


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_its_window(page: webdriver.Chrome, width: int, scheme: str) -> None:
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    resize(page, width)
    inner, whole, body = page.execute_script(
        "return [innerWidth, document.documentElement.scrollWidth, document.body.scrollWidth]"
    )
    assert inner == width and whole <= width and body <= width
    boxes = page.execute_script(
        """return [...document.querySelectorAll(".scroll")]
          .map((box) => [box.clientWidth, box.scrollWidth, box.tabIndex])"""
    )
    assert all(client <= width and index == 0 for client, _, index in boxes)
    if width == 390:
        assert any(whole > client for client, whole, _ in boxes)  # tables scroll in their boxes
    ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_filters(page: webdriver.Chrome) -> None:
    resize(page, 1280)
    arms = [arm.name for arm in ARMS]
    everything = shown(page)
    assert [number for number, _ in everything] == list(range(1, 37))
    assert all(cards == arms for _, cards in everything)

    choose(page, "f-set", "1")
    assert [number for number, _ in shown(page)] == list(range(25, 37))
    choose(page, "f-set", "")

    choose(page, "f-text", "  NEEDLE ")
    assert [number for number, _ in shown(page)] == [1, 4]
    count = page.execute_script("return document.getElementById('f-count').textContent")
    assert count == "2 of 36 prompts"
    choose(page, "f-text", "topic 7?")
    assert [number for number, _ in shown(page)] == [8, 32]
    choose(page, "f-text", "")

    page.execute_script("document.querySelector('input[name=arm][value=\"1\"]').click()")
    assert all(cards == [arm for arm in arms if arm != "refusal@0"] for _, cards in shown(page))
    page.execute_script("document.querySelector('input[name=arm][value=\"1\"]').click()")


@pytest.mark.parametrize(("value", "metrics"), [("any", "01"), ("0", "0"), ("1", "1")])
def test_only_flips(page: webdriver.Chrome, value: str, metrics: str) -> None:
    wanted = page.execute_script(
        """return [...document.querySelectorAll(".transcript")].map((node) => [
            Number(node.querySelector(".index").textContent),
            [...node.querySelectorAll(".card")]
              .filter((card) => [...card.querySelectorAll(".flip")].some((score) =>
                (arguments[0].includes("0") && score.textContent.startsWith("refusal ")) ||
                (arguments[0].includes("1") && score.textContent.startsWith("false_refusal "))))
              .map((card) => card.querySelector("h3").textContent),
          ])""",
        metrics,
    )
    choose(page, "f-flips", value)
    assert shown(page) == [(n, ["plain", *flipped]) for n, flipped in wanted if flipped]
    assert 0 < len(shown(page)) < 36


def test_it_can_be_read_by_all(page: webdriver.Chrome) -> None:
    problems = page.execute_script(
        """const problems = [];
        const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
        if (new Set(ids).size < ids.length) problems.push("an id twice");
        for (const link of document.querySelectorAll("a[href^='#']"))
          if (!document.querySelector(link.getAttribute("href"))) problems.push(link.href);
        for (const table of document.querySelectorAll("table"))
          if (!table.caption || !table.caption.textContent.trim()) problems.push("no caption");
        for (const field of document.querySelectorAll("select, input"))
          if (!field.labels.length) problems.push("no label: " + field.id);
        for (const image of document.querySelectorAll("svg:not(svg svg)"))
          if (!image.ariaHidden && !image.ariaLabel) problems.push("no text for a picture");
        const headings = document.querySelectorAll("h1, h2, h3, h4, h5, h6");
        const levels = [...headings].map((heading) => Number(heading.tagName[1]));
        levels.forEach((level, i) => {
          if (i && level > levels[i - 1] + 1) problems.push("a heading skips a level");
        });
        return problems;"""
    )
    assert problems == []


def test_it_can_be_read_without_scripts(page: webdriver.Chrome, report: Path) -> None:
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.get(report.as_uri())
        root = page.execute_cdp_cmd("DOM.getDocument", {})["root"]["nodeId"]
        query = {"nodeId": root, "selector": "#filters[hidden]"}
        assert page.execute_cdp_cmd("DOM.querySelector", query)["nodeId"]
        query["selector"] = ".transcript[hidden], .card[hidden]"
        assert not page.execute_cdp_cmd("DOM.querySelectorAll", query)["nodeIds"]
    finally:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
