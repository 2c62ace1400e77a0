"""The page in a real browser: Debian's Chromium, driven by Playwright; skipped where it is not."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from recformer.data.processed import Sequences, write_processed
from recformer.serving.app import create_app
from recformer.serving.examples import ExampleUsers
from recformer.serving.service import Service
from tests.serving.conftest import KEY, NAMES, TEXTS, MakeService, listening, make_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

expect.set_options(timeout=60_000)  # a busy machine is no fault of the page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def users(tmp_path: Path) -> ExampleUsers:
    write_processed(
        tmp_path / "data",
        train=Sequences.from_lists([[0, 1], [2, 3]]),
        val=Sequences.from_lists([[2], []]),
        test=Sequences.from_lists([[3], [4]]),
        user_names=["u0", "u1"],
        asins=NAMES,
        meta=TEXTS,
        dataset={},
    )
    return ExampleUsers(tmp_path / "data")


@pytest.fixture
def page(browser: Browser, service: Service, users: ExampleUsers) -> Iterator[Page]:
    with listening(create_app(service, test_users=users)) as address:
        yield from opened(browser, address)


def opened(browser: Browser, address: str) -> Iterator[Page]:
    """The page, which may write nothing to the console and load nothing from elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: said.type == "error" and faults.append(said.text))
    page.on("request", lambda asked: asked.url.startswith(address) or faults.append(asked.url))
    page.goto(address)
    yield page
    context.close()
    faults = [each for each in faults if "401" not in each and not each.startswith("data:")]
    assert faults == []


def titles(page: Page, model: str = "main") -> list[str]:
    return page.locator(f"#items-{model} .title").all_text_contents()


def asked(service: Service, history: list[str]) -> list[str]:
    (answer,) = service.main.recommender.recommend([history], 10, filter_seen=True)
    texts = service.main.attributes
    return [str((texts(name) or {})["title"]) for name in answer.items]


def test_a_history_is_put_together_by_keyboard(page: Page, service: Service) -> None:
    expect(page.locator("#items-main .item")).to_have_count(8)
    assert titles(page)[0] == "rope"  # bought most often
    page.locator("#search").focus()
    page.keyboard.type("lam")
    expect(page.locator("#found button")).to_have_count(1)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#history li")).to_have_count(1)
    expect(page.locator("#items-main .item")).to_have_count(7)
    assert titles(page) == asked(service, ["B1"])
    page.keyboard.type("acme torc")
    expect(page.locator("#found button")).to_have_count(0)
    page.keyboard.press("Escape")
    page.keyboard.type("torc")
    expect(page.locator("#found button")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.locator("#items-main .item")).to_have_count(6)
    assert titles(page) == asked(service, ["B1", "B6"])
    expect(page.locator("#items-main .reason").first).to_have_text(re.compile("lamp|torch"))
    page.locator("#history button").first.press("Enter")
    expect(page.locator("#items-main .item")).to_have_count(7)
    assert titles(page) == asked(service, ["B6"])
    page.locator("#clear").click()
    expect(page.locator("#items-main .item")).to_have_count(8)


def test_a_test_user_and_what_came_next(page: Page, service: Service) -> None:
    page.locator("#user").fill("0")
    page.locator("#user").press("Enter")
    expect(page.locator("#history li span")).to_have_text(["tent", "lamp", "stove"])
    expected = asked(service, ["B0", "B1", "B2"])
    expect(page.locator("#next")).to_have_text(
        f"What really came next: rope (place {expected.index('rope') + 1})"
    )
    expect(page.locator(".item.target .title")).to_have_text("rope")


def test_an_explanation(page: Page) -> None:
    page.locator("#user").fill("0")
    page.locator("#user").press("Enter")
    expect(page.locator("#items-main .item")).to_have_count(5)
    page.locator("#items-main .why").first.click()
    place = page.locator("#items-main .explanation").first
    expect(place.locator("td").first).to_have_text(re.compile("tent|lamp|stove"))
    expect(place).to_contain_text("its title")


def test_titles_are_text_and_never_markup(page: Page, service: Service) -> None:
    evil = "<img src=x onerror=alert(1)><b>tent</b>"
    page.on("dialog", lambda dialog: pytest.fail("a title was run"))
    page.locator("#add-title").fill(evil)
    page.locator("#add-form input[name=brand]").fill("<i>Acme</i>")
    page.locator("#add-form button").click()
    expect(page.locator("#added li span")).to_have_text(evil)
    expect(page.locator("#items-main .item.new .title")).to_have_text(evil)
    page.locator("#search").fill("onerror")
    expect(page.locator("#found button span").first).to_have_text(evil)
    page.locator("#found button").first.click()
    expect(page.locator("#history li span")).to_have_text(evil)
    expect(page.locator("#items-main .reason").first).to_contain_text("onerror")
    page.locator("#items-main .why").first.click()
    expect(page.locator("#items-main .explanation").first).to_contain_text("onerror")
    assert page.locator("main img, main b, main i").count() == 0


def test_a_new_product_appears_and_goes(page: Page, service: Service) -> None:
    page.locator("#add-title").fill("tent lamp stove")
    page.locator("#add-title").press("Enter")
    expect(page.locator("#items-main .item.new .title")).to_have_text("tent lamp stove")
    expect(page.locator("#facts")).to_contain_text("9 products")
    page.locator("#added button", has_text="Delete").click()
    expect(page.locator("#items-main .item.new")).to_have_count(0)
    expect(page.locator("#facts")).to_contain_text("8 products")


def test_two_models_and_a_key(
    browser: Browser, make_service: MakeService, model_folder: Path, tmp_path: Path
) -> None:
    service = make_service(model_folder, make_model(tmp_path / "o" / "best_model", seed=2))
    with listening(create_app(service, KEY)) as address:
        for page in opened(browser, address):
            expect(page.locator("#key-form")).to_be_visible()
            page.locator("#key").fill(KEY)
            page.locator("#key").press("Enter")
            expect(page.locator("#items-main .item")).to_have_count(8)
            expect(page.locator("#items-beside .item")).to_have_count(8)
            expect(page.locator("#key-form")).to_be_hidden()
            expect(page.locator("#status")).to_contain_text("8 of 8 in both lists")


def test_docs_load_nothing_from_elsewhere(browser: Browser, service: Service) -> None:
    with listening(create_app(service, KEY)) as address:
        for page in opened(browser, address):
            page.goto(f"{address}/docs")
            expect(page.locator(".opblock").first).to_be_visible()
            expect(page.get_by_role("button", name="Authorize")).to_be_visible()
            page.get_by_role("button", name="Authorize").click()
            page.locator(".auth-container input").fill(KEY)
            page.locator(".auth-btn-wrapper .authorize").click()
            page.get_by_role("button", name="Close").last.click()
            page.locator(".opblock", has_text="/v1/facts").locator("button").first.click()
            page.get_by_role("button", name="Try it out").click()
            page.get_by_role("button", name="Execute").click()
            expect(
                page.locator(
                    ".live-responses-table .status code, .live-responses-table .response-col_status"
                ).last
            ).to_contain_text("200")


def test_nothing_can_be_pressed_before_the_service_has_answered(page: Page) -> None:
    waiting: list[Route] = []
    page.route("**/v1/facts", lambda route: waiting.append(route), times=1)  # held back
    page.reload()
    for name in ("#search", "#add-title", "#seen", "#another"):
        expect(page.locator(name)).to_be_disabled()
    waiting[0].continue_()
    page.locator("#add-title").fill("tent")
    page.locator("#add-title").press("Enter")
    expect(page.locator("#items-main .item.new")).to_have_count(1)
    expect(page.locator("#problem")).to_be_hidden()


@pytest.mark.parametrize("width", [320, 768, 1280])
def test_nothing_is_cut_off_on_narrow_screens(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.locator("#add-title").fill("tent" * 60)
    page.locator("#add-title").press("Enter")
    expect(page.locator("#items-main .item.new")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_light_and_dark(page: Page) -> None:
    def brightness() -> int:
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", color)))

    page.emulate_media(color_scheme="light")
    light = brightness()
    page.emulate_media(color_scheme="dark")
    assert (light > 600, brightness() < 150) == (True, True)
