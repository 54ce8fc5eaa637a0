"""The search page in a real browser, against the real server over a tiny run."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import SCRIPT, Open, serving

if TYPE_CHECKING:
    from simlm.serve.engine import Engine

FAILED = "Failed to load resource"
LABELS = ["BM25", "Dense", "Hybrid", "Re-ranked"]


def titles(page: Page) -> list[str]:
    return page.locator(".result .title").all_inner_texts()


def refuse(page: Page, status: int, *, times: int = 1, path: str = "**/search", headers: dict[str, str] | None = None) -> list[int]:
    """Answer the next `times` requests with an error; the list grows by one with each request, refused or not."""
    asked: list[int] = []
    body = {"error": {"type": "x", "message": f"refused with {status}", "param": None, "code": None}}

    def answer(route: Route) -> None:
        asked.append(len(asked))
        if len(asked) <= times:
            route.fulfill(status=status, body=json.dumps(body), headers={"content-type": "application/json", **(headers or {})})
        else:
            route.continue_()

    page.route(path, answer)
    return asked


def wait_until(page: Page, true: Callable[[], bool]) -> None:
    """Let the page go on until something has happened on this side."""
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "it never happened"
        page.wait_for_timeout(10)


# --- typing, reading, switching


def test_it_says_what_can_be_searched_and_offers_an_example(open_page: Open) -> None:
    page = open_page()
    expect(page).to_have_title("kettles search")
    expect(page.get_by_role("heading", name="Ask 64 passages")).to_be_visible()
    expect(page.get_by_role("searchbox", name="Search the passages")).to_be_focused()
    expect(page.locator(".modes label")).to_have_text(LABELS)
    page.get_by_role("button", name="Try").click()
    expect(page.locator(".result").first).to_be_visible()
    expect(page.get_by_role("searchbox")).to_have_value(re.compile("^what do you need to keep the "))


def test_results_come_as_one_types(open_page: Open) -> None:
    page = open_page()
    page.get_by_role("radio", name="BM25").check()
    page.locator("#query").press_sequentially("glass orchard valley")
    expect(page.get_by_role("status")).to_contain_text("results · BM25 ·")
    first = page.locator(".result").first
    expect(first.locator(".snippet mark")).to_have_text(["glass", "orchard", "valley"])
    expect(first.locator(".title")).to_have_text("Glass Orchard")
    expect(first.locator(".rank")).to_have_text(re.compile(r"1\s*$"))
    expect(page).to_have_url(re.compile(r"[?&]q=glass\+orchard\+valley"))
    page.locator("#query").fill("")
    expect(page.get_by_role("heading", name="Ask 64 passages")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("")
    expect(page).not_to_have_url(re.compile("q="))


def test_only_the_last_answer_is_shown(open_page: Open) -> None:
    """What was typed first is answered last: that request was given up, and its answer is not shown."""
    page = open_page()
    held: list[Route] = []

    def hold_the_first(route: Route) -> None:
        if route.request.post_data_json["query"] == "silent drum":
            held.append(route)
        else:
            route.continue_()

    page.route("**/search", hold_the_first)
    with page.expect_event("requestfailed") as given_up:
        page.locator("#query").fill("silent drum")
        wait_until(page, lambda: bool(held))
        page.locator("#query").fill("velvet anchor")
    assert given_up.value.failure == "net::ERR_ABORTED"
    expect(page.locator(".result").first).to_contain_text("Velvet Anchor")
    expect(page.locator("#alert")).to_be_hidden()


def test_one_request_for_quick_typing(open_page: Open) -> None:
    page = open_page()
    asked = refuse(page, 500, times=0)
    page.clock.install(time=0)
    page.clock.pause_at(1000)
    page.locator("#query").press_sequentially("copper violin")
    page.clock.run_for(130)
    assert asked == []
    page.clock.run_for(1000)
    expect(page.locator(".result").first).to_be_visible()
    assert len(asked) == 1


def test_every_mode_and_where_a_result_stands(open_page: Open) -> None:
    page = open_page("/?q=marble+bicycle+square")
    for label in LABELS:
        page.get_by_role("radio", name=label, exact=True).check()
        expect(page.get_by_role("status")).to_contain_text(f"· {label} ·")
        shown = page.locator(".result").first.locator(".standing .shown")
        expect(shown.locator("dt")).to_have_text(label)
        expect(shown.locator(".place")).to_have_text(re.compile(r"(^|\D)1\s*$"))
        expect(shown.locator(".score")).to_have_text(re.compile(r"^\s*score\s+-?[\d.]+\s*$"))
    # Re-ranked is made from the hybrid list, and that from both others: a passage stands in all four.
    expect(page.locator(".result").first.locator(".standing dt")).to_have_text(LABELS)


def test_show_more_goes_on_where_the_list_ended(open_page: Open) -> None:
    page = open_page("/?q=the+first+one+was+built&mode=dense")
    expect(page.locator(".result")).to_have_count(10)
    before = titles(page)
    page.get_by_role("button", name="Show more").click()
    expect(page.locator(".result")).to_have_count(20)
    expect(page.locator(".result .title").nth(10)).to_be_focused()
    assert titles(page)[:10] == before


def test_a_passage_opens_whole_and_closes(open_page: Open) -> None:
    page = open_page("/?q=gramophone&mode=bm25")
    title = page.locator(".result .title").first
    # No title: the id stands for it. The part with the match is shown, not the beginning.
    expect(title).to_have_text("odd/long")
    expect(page.locator(".result").first.locator("mark")).to_have_text(["gramophone"])
    assert len(page.locator(".result .snippet").first.inner_text()) < 400
    title.click()
    dialog = page.get_by_role("dialog", name="odd/long")
    expect(dialog).to_be_visible()
    assert dialog.locator(".text").inner_text().count("Sand and more sand.") == 120
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(title).to_be_focused()
    title.click()
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_be_hidden()


def test_marks_stand_right_behind_characters_of_two_units(open_page: Open) -> None:
    page = open_page("/?q=owlery+night&mode=bm25")
    expect(page.locator(".result .title mark")).to_have_text(["owlery"])
    expect(page.locator(".result .snippet mark")).to_have_text(["owlery", "night"])


# --- side by side


def test_lists_side_by_side(open_page: Open) -> None:
    page = open_page("/?q=feather+bridge+canyon")
    page.get_by_role("switch", name="Compare").check()
    columns = page.locator(".column")
    expect(columns).to_have_count(4)
    expect(columns.locator("h3 .title")).to_have_text(LABELS)
    expect(page.locator(".links path")).not_to_have_count(0)
    card = columns.nth(2).locator(".card").first
    card.hover()
    passage = card.get_attribute("data-passage")
    assert passage is not None
    same = page.locator(".card.same")
    expect(same).not_to_have_count(0)
    assert {other.get_attribute("data-passage") for other in same.all()} == {passage}
    line = page.locator("#standing-line")
    for label in LABELS:
        expect(line).to_contain_text(re.compile(rf"{label} (#\d+|\u2013)"))
    rank = re.search(r"Hybrid #(\d+)", line.inner_text())
    assert rank is not None
    assert rank[1] == "1"
    assert "Hybrid rank 1" in str(card.get_attribute("aria-label"))
    expect(page).to_have_url(re.compile("compare=1"))
    # A heading leads to its list alone.
    columns.nth(3).get_by_role("button", name="Re-ranked", exact=True).click()
    expect(page.locator(".result").first).to_be_visible()
    expect(page.get_by_role("radio", name="Re-ranked")).to_be_checked()


def test_arrows_across_lists(open_page: Open) -> None:
    page = open_page("/?q=feather+bridge&compare=1")
    expect(page.locator(".column")).to_have_count(4)
    page.locator("#query").focus()
    page.keyboard.press("ArrowDown")
    first = page.locator(".column").first.locator(".card").first
    expect(first).to_be_focused()
    page.keyboard.press("ArrowRight")
    focused = page.locator(".card:focus")
    expect(focused).to_have_attribute("data-mode", "dense")
    page.keyboard.press("ArrowLeft")
    expect(focused).to_have_attribute("data-mode", "bm25")
    expect(page.locator("#standing-line")).to_contain_text(focused.locator(".name").inner_text())


# --- filters


def test_filters(open_page: Open) -> None:
    page = open_page("/?q=the+first+one&mode=dense")
    menu = page.locator(".filter", has_text="aspect")
    menu.locator("summary").click()
    menu.get_by_role("checkbox", name="origin").check()
    expect(page.locator(".chips .chip")).to_have_text(re.compile("aspect: origin"))
    expect(page.locator(".result .about")).to_contain_text(["aspect: origin"] * 10)
    menu.get_by_role("checkbox", name="needs").check()
    expect(page.locator(".chips .chip")).to_have_count(2)
    expect(page).to_have_url(re.compile("filter.aspect=origin&filter.aspect=needs"))
    page.keyboard.press("Escape")
    expect(menu.get_by_role("checkbox", name="needs")).to_be_hidden()
    # A value of a result is a filter too; numbers work like text.
    page.locator(".result .chip", has_text="century: 18").first.click()
    expect(page.locator(".chips .chip")).to_have_count(3)
    expect(page.locator(".result .about").first).to_contain_text("century: 18")
    page.get_by_role("button", name="Clear filters").click()
    expect(page.locator(".chips .chip")).to_have_count(0)
    expect(page).not_to_have_url(re.compile("filter"))


def test_filters_that_leave_nothing(open_page: Open) -> None:
    page = open_page("/?q=granite+kettle&mode=bm25&filter.topic=silent-drum&filter.unknown=x")
    # A field that this corpus does not have is dropped.
    expect(page.locator(".chips .chip")).to_have_count(1)
    expect(page.get_by_role("heading", name="Nothing found")).to_be_visible()
    page.get_by_role("button", name="Search without filters").click()
    expect(page.locator(".result").first).to_contain_text("Granite Kettle")


def test_no_results(open_page: Open) -> None:
    page = open_page("/?q=qqqqq&mode=bm25")
    expect(page.get_by_role("status")).to_contain_text("No results")
    page.get_by_role("button", name="Search by meaning instead").click()
    expect(page.locator(".result")).to_have_count(10)
    expect(page.get_by_role("radio", name="Dense")).to_be_checked()


# --- keyboard and address


def test_keyboard(open_page: Open) -> None:
    page = open_page("/?q=salt+library&mode=bm25")
    expect(page.locator(".result").first).to_be_visible()
    page.keyboard.press("/")
    expect(page.locator("#query")).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".result .title").nth(0)).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".result .title").nth(1)).to_be_focused()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    # Keys of the page do nothing behind the open passage.
    page.keyboard.press("/")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".result .title").nth(0)).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.locator("#query")).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Escape")
    expect(page.locator("#query")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#query")).to_have_value("")
    page.locator("#query").press_sequentially("a/b")
    expect(page.locator("#query")).to_have_value("a/b")


def test_an_address_is_a_search_and_back_goes_back(open_page: Open) -> None:
    page = open_page("/?q=amber+compass&mode=bm25&compare=1")
    expect(page.locator("#query")).to_have_value("amber compass")
    expect(page.locator(".column")).to_have_count(4)
    page.get_by_role("switch", name="Compare").uncheck()
    expect(page.locator(".result").first).to_contain_text("Amber Compass")
    page.get_by_role("radio", name="Dense").check()
    expect(page.get_by_role("status")).to_contain_text("· Dense ·")
    page.go_back()
    expect(page.get_by_role("status")).to_contain_text("· BM25 ·")
    page.go_back()
    expect(page.locator(".column")).to_have_count(4)


# --- what goes wrong


def test_a_busy_server_is_asked_again(open_page: Open) -> None:
    page = open_page(forgive=FAILED)
    asked = refuse(page, 429, headers={"retry-after": "1"})
    page.locator("#query").fill("paper lighthouse")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("refused with 429. Asking again in 1 second.")
    expect(page.locator(".result").first).to_contain_text(re.compile("paper lighthouse"))
    expect(alert).to_be_hidden()
    assert len(asked) == 2


def test_a_server_that_is_away_keeps_what_was_found(open_page: Open) -> None:
    page = open_page("/?q=paper+lighthouse", forgive=FAILED)
    expect(page.locator(".result").first).to_be_visible()
    page.route("**/search", lambda route: route.abort())
    page.locator("#query").fill("copper violin")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")
    expect(page.locator(".result").first).to_contain_text(re.compile("paper lighthouse"))
    page.unroute("**/search")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".result").first).to_contain_text("Copper Violin")
    expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.parametrize("status", [422, 500])
def test_a_refusal_says_why(open_page: Open, status: int) -> None:
    page = open_page("/?q=paper+lighthouse", forgive=FAILED)
    expect(page.locator(".result").first).to_be_visible()
    asked = refuse(page, status)
    page.locator("#query").fill("copper violin")
    expect(page.get_by_role("alert")).to_contain_text(f"refused with {status}")
    expect(page.locator(".result")).to_have_count(0)
    # Sending what is wrong once more does not make it right.
    expect(page.get_by_role("button", name="Try again")).to_have_count(0 if status == 422 else 1)
    page.locator("#query").fill("velvet anchor")
    expect(page.locator(".result").first).to_contain_text("Velvet Anchor")
    assert len(asked) == 2


def test_an_answer_that_is_no_json(open_page: Open) -> None:
    page = open_page(forgive=FAILED)
    page.route("**/search", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    page.locator("#query").fill("copper violin")
    expect(page.get_by_role("alert")).to_contain_text("The server answered with status 502.")


def test_a_server_that_starts_later(open_page: Open) -> None:
    page = open_page("/favicon.ico", forgive=FAILED, wait=False)
    refuse(page, 503, path="**/info", headers={"retry-after": "1"})
    page.goto(page.url.replace("favicon.ico", "?q=glass+orchard"))
    expect(page.get_by_role("alert")).to_contain_text("refused with 503")
    expect(page.locator(".result").first).to_contain_text("Glass Orchard")


def test_a_query_that_is_too_long_is_not_sent(open_page: Open) -> None:
    page = open_page()
    asked = refuse(page, 500)
    page.locator("#query").fill("🦉" * 10_001)
    expect(page.get_by_role("status")).to_have_text("The query has 10,001 characters; at most 10,000 can be searched.")
    page.locator("#query").fill("   ")
    expect(page.get_by_role("heading", name="Ask 64 passages")).to_be_visible()
    page.wait_for_timeout(300)
    assert asked == []


def test_a_token_is_asked_for_and_kept(open_page: Open, engine: Engine) -> None:
    with serving(engine, token="open sesame") as address:
        page = open_page("/?q=woollen+submarine", address=address, forgive=FAILED, wait=False)
        field = page.get_by_label("Access token")
        expect(field).to_be_focused()
        field.fill("abracadabra")
        page.get_by_role("button", name="Use token").click()
        expect(page.get_by_role("alert").filter(has_text="That token was refused.")).to_be_visible()
        field.fill("open sesame")
        page.get_by_role("button", name="Use token").click()
        expect(page.locator(".result").first).to_contain_text("Woollen Submarine")
        page.reload()
        expect(page.locator(".result").first).to_contain_text("Woollen Submarine")
        assert "sesame" not in page.url
        # A link cannot carry the token: the full report is saved instead.
        page.get_by_role("tab", name="Report").click()
        with page.expect_download() as download:
            page.get_by_role("link", name="Full report").click()
        assert download.value.suggested_filename == "report.html"


# --- what a passage holds stays text


def test_script_in_a_passage_is_text(open_page: Open) -> None:
    page = open_page("/?q=zzyzx+road")
    result = page.locator(".result", has_text="Zzyzx").first
    for part in (".title", ".snippet", ".about"):
        expect(result.locator(part)).to_contain_text(SCRIPT)
    result.locator(".title").click()
    expect(page.get_by_role("dialog")).to_contain_text(SCRIPT)
    page.keyboard.press("Escape")
    page.get_by_role("switch", name="Compare").check()
    expect(page.locator(".card", has_text="Zzyzx").first).to_be_visible()
    assert page.evaluate("window.wasRun") is None
    assert page.locator("main script, main img, dialog script, dialog img").count() == 0


def test_script_in_a_query_or_an_address_is_text(open_page: Open) -> None:
    page = open_page(f"/?q={SCRIPT}&filter.{SCRIPT}={SCRIPT}&mode=constructor")
    expect(page.locator("#query")).to_have_value(SCRIPT)
    expect(page.get_by_role("radio", name="Hybrid")).to_be_checked()
    assert page.evaluate("window.wasRun") is None


def test_the_policy_is_strict(open_page: Open, server: str) -> None:
    page = open_page(forgive="script-src")
    policy = page.request.get(server + "/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    # And it holds: a script that gets into the page is not run.
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.wasRun = true' }))")
    assert page.evaluate("window.wasRun") is None


# --- report


def test_report(open_page: Open) -> None:
    page = open_page()
    page.get_by_role("tab", name="Report").click()
    view = page.get_by_role("tabpanel", name="Report")
    expect(view.get_by_role("heading", name="kettles")).to_be_visible()
    expect(page).to_have_url(re.compile("tab=report"))
    expect(view.locator(".verdicts li")).not_to_have_count(0)
    measures = view.get_by_role("region", name="Measures")
    expect(measures.locator("tbody th")).to_have_text(["BM25", "Retriever 1", "Re-ranker", "Hybrid"])
    expect(measures.locator("thead th").first).to_have_text("System")
    expect(view.get_by_role("region", name="Time and memory").locator("tbody th")).not_to_have_count(0)
    steps = view.get_by_role("region", name="Time and memory").locator("tbody th").all_inner_texts()
    assert steps[0] == "store"
    assert steps.index("retriever1") < steps.index("reranker") < steps.index("all")
    charts = view.get_by_role("img", name=re.compile("loss over training steps: loss from"))
    expect(charts).to_have_count(2)
    expect(charts.first.locator("polyline")).not_to_have_count(0)
    link = view.get_by_role("link", name="Full report")
    expect(link).to_have_attribute("target", "_blank")
    with page.expect_popup() as popup:
        link.click()
    expect(popup.value).to_have_title("kettles: simlm report")


def test_queries_won_and_lost_can_be_searched(open_page: Open) -> None:
    page = open_page("/?tab=report")
    cases = page.locator(".case")
    cases.first.locator("summary").click()
    query = cases.first.locator(".question").inner_text()
    expect(cases.first.locator(".trio > div")).to_have_count(3)
    cases.first.get_by_role("button", name="Search this").click()
    expect(page.locator("#query")).to_have_value(query)
    expect(page.locator(".result").first).to_be_visible()


def test_a_report_that_cannot_be_read(open_page: Open) -> None:
    page = open_page(forgive=FAILED)
    refuse(page, 500, path="**/report")
    page.get_by_role("tab", name="Report").click()
    expect(page.get_by_role("alert")).to_contain_text("refused with 500")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("heading", name="kettles")).to_be_visible()


# --- for every eye, hand and screen

STATES: dict[str, str] = {
    "empty": "/",
    "results": "/?q=granite+kettle&filter.century=17&mode=rerank",
    "lists": "/?q=granite+kettle&compare=1",
    "nothing": "/?q=qqqqq&mode=bm25",
    "report": "/?tab=report",
}
READY = {"empty": ".empty", "results": ".result", "lists": ".card", "nothing": ".empty", "report": ".chart"}


def shown(open_page: Open, state: str, **more: Any) -> Page:
    page = open_page(STATES[state], **more)
    page.locator(READY[state]).first.wait_for()
    return page


OVERHANG = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.parametrize("state", STATES)
def test_no_sideways_scrolling(open_page: Open, state: str) -> None:
    page = shown(open_page, state, width=360)
    assert page.evaluate(OVERHANG) <= 0
    page.set_viewport_size({"width": 768, "height": 800})
    assert page.evaluate(OVERHANG) <= 0


def test_a_word_without_end_is_broken(open_page: Open) -> None:
    page = open_page("/?q=unbreakable&mode=bm25", width=360)
    page.locator(".result .title").first.click()
    dialog = page.get_by_role("dialog", name="Unbroken")
    expect(dialog).to_be_visible()
    assert dialog.evaluate("dialog => dialog.scrollWidth - dialog.clientWidth") <= 0
    assert page.evaluate(OVERHANG) <= 0


CONTRAST = """() => {
  const channel = (value) => { const v = value / 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const background = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color[3] === 1) return color;
      if (color[3] > 0) throw new Error('a background that lets through: ' + at.className);
    }
    return [255, 255, 255];
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest('.unseen, noscript')) continue;
    const style = getComputedStyle(element);
    const text = element.closest('svg') ? parse(style.fill) : parse(style.color);
    const [a, b] = [luminance(text), luminance(background(element))].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (large ? 3 : 4.5)) poor.push([element.tagName, element.className, ratio.toFixed(2), walker.currentNode.data].join(' '));
  }
  return poor;
}"""


@pytest.mark.parametrize("state", STATES)
def test_contrast(open_page: Open, state: str) -> None:
    page = shown(open_page, state)
    if state == "lists":
        page.locator(".card").first.hover()
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for scheme in schemes:
        page.emulate_media(color_scheme=scheme)
        expect(page.locator("html")).to_have_attribute("data-theme", scheme)
        assert page.evaluate(CONTRAST) == []
    if state == "results":
        page.locator(".result .title").first.click()
        expect(page.get_by_role("dialog")).to_be_visible()
        assert page.evaluate(CONTRAST) == []


def test_light_and_dark(open_page: Open) -> None:
    page = open_page(dark=True)
    back = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(back)
    toggle = page.get_by_role("button", name="Dark colours")
    expect(toggle).to_have_attribute("aria-pressed", "true")
    toggle.click()
    light = page.evaluate(back)
    assert light != dark
    page.reload()
    expect(page.get_by_role("button", name="Dark colours")).to_have_attribute("aria-pressed", "false")
    assert page.evaluate(back) == light
    # Who has chosen nothing follows the system.
    other = open_page()
    assert other.evaluate(back) == light
    other.emulate_media(color_scheme="dark")
    expect(other.get_by_role("button", name="Dark colours")).to_have_attribute("aria-pressed", "true")


@pytest.mark.parametrize("state", STATES)
def test_names_and_roles(open_page: Open, state: str) -> None:
    page = shown(open_page, state)
    tree = page.locator("body").aria_snapshot()
    nameless = re.findall(
        r"^ *- (?:button|link|textbox|searchbox|checkbox|radio|switch|tab|tabpanel|region|dialog|img)(?: \[.*\])?:?$", tree, re.M
    )
    assert nameless == []
    for role in ("banner", "main", "contentinfo", "tablist"):
        assert page.get_by_role(role).count() == 1  # type: ignore[arg-type]
    assert page.get_by_role("heading", level=1).count() == 1
    headings = page.locator("h1, h2, h3, h4").filter(visible=True)
    levels = [int(tag[1]) for tag in headings.evaluate_all("headings => headings.map((heading) => heading.tagName)")]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert (
        page.evaluate("new Set([...document.querySelectorAll('[id]')].map((element) => element.id)).size") == page.locator("[id]").count()
    )
    assert page.locator("[style], style, main script").count() == 0
    if state != "report":
        expect(page.get_by_role("search", name="Passages")).to_be_visible()


def test_tabs_by_keyboard(open_page: Open) -> None:
    page = open_page()
    page.locator("#tab-search").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Report")).to_be_focused()
    expect(page.get_by_role("tab", name="Report")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("tabpanel", name="Search")).to_be_hidden()
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("tabpanel", name="Search")).to_be_visible()


def test_the_first_stop_leads_to_the_search_box(open_page: Open) -> None:
    page = open_page("/?q=granite+kettle")
    page.locator(".result").first.wait_for()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the search box")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#query")).to_be_focused()


def test_nothing_jumps_while_an_answer_is_on_its_way(open_page: Open) -> None:
    page = open_page("/?q=granite+kettle", forgive=FAILED)
    page.locator(".result").first.wait_for()
    box, place = page.locator("#query").bounding_box(), page.locator("#answer").bounding_box()
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/search", hold)
    page.locator("#query").fill("granite kettle needs")
    wait_until(page, lambda: bool(held))
    assert page.locator("#answer").bounding_box() == place
    # Nor where it fails.
    held[0].fulfill(status=429)
    expect(page.get_by_role("alert")).to_be_visible()
    assert page.locator("#query").bounding_box() == box
    assert page.locator("#answer").bounding_box() == place
