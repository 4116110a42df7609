"""The server's page in a real browser."""

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("playwright")

from playwright import sync_api

from tests.support.serving import Limits, Metrics, Server, make_worker, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium: apt install chromium"
)
SHOTS = os.environ.get("OPT_SCREENSHOTS")
"""A folder to put pictures of the page in; None: none are taken."""


@pytest.fixture(scope="module")
def url():
    metrics = Metrics()
    workers = [
        make_worker(metrics, name="mini", slots=2),
        make_worker(metrics, name="mini again", slots=2),
    ]
    with serving(Server(workers, Limits(key="secret"), metrics)) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url, request):
    """The page with its key given; whatever it asks another host for, or complains of, fails."""
    options = {"color_scheme": "light", **getattr(request, "param", {})}
    context = browser.new_context(**options)
    page, wrong = context.new_page(), []
    page.on("request", lambda r: None if r.url.startswith(url) else wrong.append(r.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(url)
    sync_api.expect(page.get_by_role("status")).to_contain_text("bearer token")
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Tab")
    sync_api.expect(page.get_by_role("status")).to_have_text("Ready")
    assert page.get_by_label("Compare with").locator("option").count() == 3
    page.get_by_label("Prompt").fill("ROMEO:")
    yield page
    assert not wrong
    context.close()


def shoot(page, name):
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)


def ends(page, word="Done"):
    sync_api.expect(page.get_by_role("status")).to_have_text(word, timeout=30_000)


def test_a_text_is_written_and_explained(page, url):
    page.get_by_label("New tokens").fill("30")
    page.get_by_role("button", name="Write").click()
    ends(page)
    text = page.get_by_role("group", name="Text of mini")
    assert text.inner_text().startswith("ROMEO:")
    assert page.locator(".token").count() == 30
    colours = page.evaluate(
        "[...new Set([...document.querySelectorAll('.token')].map("
        "t => getComputedStyle(t).backgroundColor))]"
    )
    assert len(colours) >= 3, "tokens look alike"
    page.locator(".token").nth(3).hover()
    rows = page.locator("#details tbody tr")
    assert 5 <= rows.count() <= 6
    assert page.locator("#details tr.taken").count() == 1
    assert page.get_by_role("heading", name="Token 4").is_visible()
    shoot(page, "one")


def test_by_keyboard_alone(page):
    page.get_by_label("Prompt").press("Control+Enter")
    ends(page)
    text = page.get_by_role("group", name="Text of mini")
    text.focus()
    for _ in range(3):
        text.press("ArrowRight")
    assert page.get_by_role("heading", name="Token 3").is_visible()
    assert "percent" in page.get_by_role("status").inner_text()
    text.press("ArrowLeft")
    assert page.get_by_role("heading", name="Token 2").is_visible()


def test_stop_stops(page):
    page.get_by_label("New tokens").fill("250")
    page.get_by_label("Temperature").fill("2")
    page.get_by_role("button", name="Write").click()
    page.locator(".token").nth(3).wait_for()
    page.get_by_role("button", name="Stop").click()
    ends(page, "Stopped")
    assert 3 < page.locator(".token").count() < 250
    assert page.get_by_role("button", name="Write").is_enabled()


@pytest.mark.parametrize("page", [{"viewport": {"width": 1280, "height": 900}}], indirect=True)
def test_two_texts_side_by_side(page):
    """The same model is told twice, once behind another seed's text: they must part."""
    page.get_by_label("Compare with").select_option("mini again")
    page.get_by_label("New tokens").fill("16")
    page.get_by_role("button", name="Write").click()
    ends(page)
    notes = page.locator(".note")
    assert [notes.nth(i).inner_text().split(", ")[-1] for i in (0, 1)] == ["the same text"] * 2
    assert page.locator(".token.differs").count() == 0
    page.evaluate(
        "() => { const real = window.fetch; window.fetch = (path, options) => {"
        " const body = JSON.parse(options.body); if (body.model === 'mini again') body.seed += 1;"
        " return real(path, { ...options, body: JSON.stringify(body) }); }; }"
    )
    page.get_by_role("button", name="Write").click()
    ends(page)
    first, second = (
        page.get_by_role("group", name=f"Text of {model}", exact=True).locator(".token")
        for model in ("mini", "mini again")
    )
    texts = first.all_inner_texts(), second.all_inner_texts()
    place = next(i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b)
    for tokens in (first, second):
        assert "differs" in (tokens.nth(place).get_attribute("class") or "")
    assert notes.nth(0).inner_text().endswith(f"differs from token {place + 1} on")
    first.nth(place).hover()
    for name, scheme, width in (("light", "light", 1280), ("dark", "dark", 1280),
                                ("phone", "light", 375)):  # fmt: skip
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        boxes = [page.locator(".output").nth(i).bounding_box() for i in (0, 1)]
        is_beside = boxes[0]["y"] == boxes[1]["y"]
        assert is_beside == (name != "phone")
        shoot(page, name)
