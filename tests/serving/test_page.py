"""The page in a real browser: what a person writes, sees and presses."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from server_process import Process, serving
from transformers import AutoConfig

from yoco_u.inference.exits import FILE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
expect.set_options(timeout=60_000)  # milliseconds: busy machines are slow, not wrong


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, timeout=300_000, args=["--no-sandbox"])
        yield browser
        browser.close()


def new_page(browser: Browser, **settings: Any) -> Page:
    page = browser.new_page(**settings)
    page.set_default_timeout(300_000)
    return page


@pytest.fixture
def page(browser: Browser, process: Process) -> Iterator[Page]:
    """The page of a server; nothing may have gone wrong on it in the end."""
    page = new_page(browser, viewport={"width": 1200, "height": 850})
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(process.url)
    expect(page.locator("#model-facts")).to_contain_text("parameters")
    page.locator("#temperature").fill("0")  # else a text may end before all its tokens
    yield page
    page.close()
    assert wrong == []


def ask(page: Page, text: str) -> None:
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def test_a_text_streams_in_with_its_figures(page: Page) -> None:
    page.locator("#max-tokens").fill("12")
    ask(page, "def first")
    answer = page.locator(".answer")
    expect(answer.locator("[data-figure=tokens]")).to_have_text("12")
    expect(answer.locator("[data-figure=first]")).to_contain_text(re.compile(r"\d+(\.\d+)? m?s"))
    expect(answer.locator("[data-figure=kv]")).to_contain_text("than a Transformer's")
    expect(answer.locator(".bars")).to_be_visible()
    expect(page.locator("#send")).to_be_visible()
    assert answer.locator(".text span").last.inner_text()


def test_two_answers_side_by_side_differ_in_loops_alone(page: Page) -> None:
    page.locator("#compare").check()
    page.locator("#max-tokens").fill("12")
    page.locator("#temperature").fill("0")
    page.locator("#loops-a").fill("2")
    page.locator("#loops-b").fill("2")
    ask(page, "x = ")
    expect(page.locator(".answer h3")).to_have_text(["T = 2", "T = 2"])
    expect(page.locator("[data-figure=tokens]")).to_have_text(["12", "12"])
    left, right = page.locator(".answer").all()
    assert left.locator(".text").inner_text() == right.locator(".text").inner_text()
    boxes = [one.bounding_box() for one in (left, right)]
    assert boxes[0] is not None and boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]


def test_tokens_that_leave_the_loop_are_as_dark_as_they_ran_loops(browser: Browser, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    loops = AutoConfig.from_pretrained(folder).architecture.num_loops
    (tmp_path / "model" / FILE).write_text(json.dumps({"num_loops": loops, "score": "angular", "threshold": 0.35}))
    with serving(tmp_path / "model", log=tmp_path / "log") as process:
        page = new_page(browser)
        page.goto(process.url)
        expect(page.locator("#model-facts")).to_contain_text("parameters")
        page.locator("#max-tokens").fill("24")
        page.locator("#temperature").fill("0")  # else the text may end before all its tokens
        page.locator("#loops-a").fill("0")
        ask(page, "def first")
        expect(page.locator("[data-figure=tokens]")).to_have_text("24")
        expect(page.locator(".answer h3")).to_have_text("T = auto")
        shown = page.locator(".warm").all()
        heats = [float(one.evaluate("span => span.style.getPropertyValue('--heat')")) for one in shown]
        told = [float((one.get_attribute("title") or "").removesuffix(f" of {loops} loops")) for one in shown]
        assert shown and all(0 <= heat <= 1 for heat in heats), heats
        assert told == pytest.approx([1 + heat * (loops - 1) for heat in heats], abs=0.051)
        page.close()


def test_keys_stop_and_begin_anew(page: Page, process: Process) -> None:
    page.locator("#max-tokens").fill("3000")
    ask(page, "x")
    expect(page.locator("#stop-all")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()
    process.wait_for('yoco_u_requests{state="running"}', 0)
    page.keyboard.press("Alt+n")
    expect(page.locator(".answer")).to_have_count(0)
    expect(page.locator("#prompt")).to_be_focused()


def test_beginning_anew_within_an_answer_forgets_it(page: Page) -> None:
    bodies: list[Any] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    page.locator("#max-tokens").fill("3000")
    ask(page, "old")
    expect(page.locator("[data-figure=tokens]")).not_to_have_text("-")
    page.keyboard.press("Alt+n")
    expect(page.locator("#send")).to_be_visible()
    page.locator("#max-tokens").fill("3")
    ask(page, "new")
    expect(page.locator("[data-figure=tokens]")).to_have_text("3")
    ask(page, "newer")
    expect(page.locator(".answer")).to_have_count(2)
    asked = [[message["content"] for message in body["messages"]] for body in bodies]
    assert asked[:2] == [["old"], ["new"]]
    assert asked[2][0] == "new" and asked[2][2:] == ["newer"]


def test_what_a_model_writes_is_never_markup(page: Page) -> None:
    page.locator("#max-tokens").fill("3")
    ask(page, "<img src=x onerror=document.title='broken'>")
    expect(page.locator("[data-figure=tokens]")).to_have_text("3")
    assert page.locator(".answer img").count() == 0 and page.title() == "tiny"


def test_an_error_of_the_server_is_said(browser: Browser, process: Process) -> None:
    page = new_page(browser)  # not the fixture's: the browser itself tells the console of a 400
    page.route("**/v1/**", lambda route: route.fulfill(status=400, json={"error": {"message": "no such thing"}}))
    page.goto(process.url)
    expect(page.locator("#model-facts")).to_contain_text("parameters")
    ask(page, "x")
    expect(page.locator(".answer .error")).to_contain_text("no such thing")
    expect(page.locator("#prompt")).to_have_value("x")
    page.close()


def test_what_is_sent_before_the_model_is_known_waits_for_it(browser: Browser, process: Process) -> None:
    page = new_page(browser)
    held: list[Route] = []
    page.route("**/model", lambda route: held.append(route))
    with page.expect_request("**/model"):
        page.goto(process.url)
    ask(page, "early")
    expect(page.locator("#prompt")).to_have_value("early")
    assert page.locator(".answer").count() == 0
    held[0].continue_()
    expect(page.locator(".turn .prompt")).to_have_text("early")
    page.close()


def test_a_model_that_was_not_there_is_asked_for_again(browser: Browser, process: Process) -> None:
    """Without any place to keep a key, and with a key that no header holds before the right one."""
    page, keys = new_page(browser), list[str | None]()
    page.add_init_script(
        "for (const name of ['localStorage', 'sessionStorage'])"
        " Object.defineProperty(window, name, { get() { throw new Error('kept from it') } })"
    )

    def facts(route: Route) -> None:
        keys.append(route.request.headers.get("authorization"))
        if len(keys) <= 2:
            route.fulfill(status=503 if len(keys) == 1 else 401, json={"error": {"message": "not now"}})
        else:
            route.continue_()

    page.route("**/model", facts)
    page.goto(process.url)
    expect(page.locator("#empty-text")).to_have_text("No model: not now.")
    ask(page, "early")
    expect(page.locator("#empty-text")).to_have_text("This server asks for an API key.")
    for key, said in (("schlüssel…", "No model: the API key has characters that no key has."), ("right", None)):
        page.locator("#key").fill(key)
        page.locator("#key").press("Enter")
        if said:
            expect(page.locator("#empty-text")).to_have_text(said)
    expect(page.locator(".turn .prompt")).to_have_text("early")
    assert keys == [None, None, "Bearer right"]
    page.close()


def test_many_tokens_are_few_paints(page: Page) -> None:
    """Each lays out the whole text. Whoever works elsewhere on the page meanwhile keeps the focus."""
    details = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0, "mean_loops": 3}
    held: list[Route] = []
    page.route("**/v1/**", lambda route: held.append(route))
    with page.expect_request("**/v1/**"):
        ask(page, "x")
    page.evaluate(
        "() => { window.paints = 0; new MutationObserver(() => paints++).observe(document.querySelector('.answer .text'),"
        " { subtree: true, childList: true }) }"
    )
    page.locator("#seed").focus()
    counts = [{"total_tokens": count, "completion_tokens": count, "completion_tokens_details": details} for count in range(500)]
    chunks = [{"choices": [{"delta": {"content": f"{count} "}}], "usage": usage} for count, usage in enumerate(counts)]
    events = [*map(json.dumps, [*chunks, {"choices": [], "usage": counts[-1]}]), "[DONE]"]
    held[0].fulfill(content_type="text/event-stream", body="".join(f"data: {event}\n\n" for event in events))
    expect(page.locator("#send")).to_be_visible()
    assert page.locator(".answer .text").inner_text().split() == [str(count) for count in range(500)]
    assert 1 <= page.evaluate("paints") < 250
    expect(page.locator("#seed")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Browser, process: Process, scheme: str) -> None:
    page = new_page(browser, viewport={"width": 360, "height": 700}, color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(process.url)
    expect(page.locator("#model-facts")).to_contain_text("parameters")
    page.locator("#settings summary").click()
    page.locator("#max-tokens").fill("5")
    page.locator("#temperature").fill("0")
    page.locator("#settings summary").click()
    ask(page, "x" * 200)
    expect(page.locator("[data-figure=tokens]")).to_have_text("5")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size({"width": 1200, "height": 700})
    expect(page.locator("#temperature")).to_be_visible()
    red, *_ = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))
    assert red < 128 if scheme == "dark" else red >= 128
    page.close()
