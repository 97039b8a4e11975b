"""The page in a real browser, on the real command: what a person does, and what goes wrong.

Needs chromium (apt-get install chromium) and playwright. Run: python -m pytest -m slow
tests/rank/test_browser.py; SCREENSHOTS=<folder> keeps pictures to look at.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.browsers import Served, keep_picture, launched, pages, servers

from rlhf.rank.store import Store

pytestmark = pytest.mark.slow
MARKUP = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<svg onload=\"document.title='owned'\"> [link](javascript:document.title='owned') "
    "![pixel](http://127.0.0.1:1/pixel.png)\x1b[31m \u202ereversed"
)


@pytest.fixture(scope="module")
def browser():
    yield from launched()


class Server(Served):
    """The command in a folder; it may be killed and given again."""

    def __init__(self, folder: Path, *arguments: str):
        super().__init__(folder, "rlhf.rank", "prompts=answers.jsonl", *arguments)

    def rankings(self) -> list[dict]:
        lines = (self.folder / "answers.rankings.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


started = pytest.fixture(servers)
opened = pytest.fixture(pages)


@pytest.fixture
def serve(tmp_path, started):
    def start(rows, *arguments):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "answers.jsonl").write_text(text, encoding="utf-8")
        started.append(Server(tmp_path, *arguments))
        return started[-1]

    return start


@pytest.fixture
def open_page(opened):
    """Open the page as somebody."""

    def start(server, name, **options):
        page = opened(server, **options)
        page.fill("#name", name)
        page.keyboard.press("Enter")
        page.wait_for_selector(".card, #done:not([hidden])")
        return page

    return start


def rows(number: int, answers=("short", "longer one", "the longest one")) -> list[dict]:
    return [{"prompt": f"Question {i}", "responses": list(answers)} for i in range(number)]


def texts(page) -> list[str]:
    return [one.inner_text() for one in page.locator(".card .text").all()]


def ranked(page, number: int) -> None:
    page.locator("#progress-text", has_text=re.compile(f"^{number} ranked")).wait_for()


def press_shortest_first(page) -> None:
    order = sorted(range(3), key=lambda card: len(texts(page)[card]))
    for card in order:
        page.keyboard.press(str(card + 1))
    page.keyboard.press("Enter")


def test_with_the_keyboard_alone_a_person_ranks_ties_edits_undoes_skips_and_flags(serve, open_page):
    server = serve(rows(4))
    page = open_page(server, "Ann")
    press_shortest_first(page)
    ranked(page, 1)
    page.keyboard.press("1")
    page.keyboard.press("=")
    page.keyboard.press("2")
    page.keyboard.press("3")
    tied = texts(page)[:2]
    keep_picture(page, "tie")
    page.keyboard.press("Enter")
    ranked(page, 2)
    page.keyboard.press("u")
    ranked(page, 1)
    assert page.locator("#order .equal").count() == 1, "what was said is there again"
    page.keyboard.press("e")
    page.locator("#demonstration").fill("A better answer")
    for key in ("Tab", "Tab", "Enter"):  # over Discard to Keep
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    ranked(page, 2)
    page.keyboard.press("s")
    page.locator("#prompt", has_text="Question 3").wait_for()
    page.keyboard.press("f")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("#done:not([hidden])")
    keep_picture(page, "done")
    page.click("#reopen")
    page.wait_for_selector(".card")
    assert "Question 2" in page.inner_text("#prompt")
    output = server.end()
    assert "2 of 4 prompts ranked" in output and "broken prompt (1)" in output
    first, second = server.rankings()
    assert first["ranks"] == [0, 1, 2]
    equal = {
        text for text, rank in zip(second["responses"], second["ranks"], strict=True) if not rank
    }
    assert equal == set(tied)
    written = (server.folder / "answers.rankings.demonstrations.jsonl").read_text()
    assert json.loads(written)["completion"] == "A better answer"


def test_with_a_mouse_a_person_clicks_and_drags(serve, open_page):
    server = serve(rows(2))
    page = open_page(server, "Ann")
    page.locator(".card .text").nth(1).click()
    page.locator(".card .chip").nth(0).click()

    def drag(start, end, share):
        source, goal = start.bounding_box(), end.bounding_box()
        page.mouse.move(source["x"] + 15, source["y"] + 15)
        page.mouse.down()
        page.mouse.move(goal["x"] + share * goal["width"], goal["y"] + 20, steps=6)
        keep_picture(page, "drag")
        page.mouse.up()

    chips = page.locator("#order .chip.in")
    drag(page.locator(".card .chip").nth(2), chips.nth(0), 0.1)  # before the first
    assert page.inner_text("#order").split() == ["Best", "3", ">", "2", ">", "1", "Worst"]
    drag(chips.nth(2), chips.nth(1), 0.5)  # on the second
    assert page.inner_text("#order").split() == ["Best", "3", ">", "2", "=", "1", "Worst"]
    page.locator("#order .between").nth(1).click()
    assert page.inner_text("#order").split() == ["Best", "3", ">", "2", ">", "1", "Worst"]
    expected = [texts(page)[card] for card in (2, 1, 0)]
    page.click("#submit")
    ranked(page, 1)
    server.end()
    (row,) = server.rankings()
    assert sorted(
        row["responses"], key=lambda text: row["ranks"][row["responses"].index(text)]
    ) == (expected)


def test_an_answer_full_of_markup_does_nothing(serve, open_page):
    server = serve([{"prompt": MARKUP, "responses": [MARKUP, "# Title\n\n* a\n* **b**", "مرحبا"]}])
    asked: list[str] = []
    page = open_page(server, "Ann")
    page.on("request", lambda request: asked.append(request.url))
    for _ in range(2):
        assert page.title() == "Rank answers"
        assert page.locator("main script, main img, main svg, main a[href^=java]").count() == 0
        keep_picture(page, f"markup-{page.get_attribute('#plain', 'aria-pressed')}")
        page.keyboard.press("p")
    assert page.locator(".card li").count() == 2
    assert all(url.startswith(server.address) for url in asked)


def test_two_annotators_share_the_prompts_and_their_agreement_is_shown(serve, open_page):
    server = serve(rows(3), "overlap=2")
    pages = [open_page(server, name) for name in ("Ann", "Bob")]
    for number in range(1, 4):
        for page in pages:
            press_shortest_first(page)
            if number < 3:
                ranked(page, number)
    for page in pages:
        page.wait_for_selector("#done:not([hidden])")
    pages[1].wait_for_selector("#agreement:not([hidden])")
    assert pages[1].inner_text("#agreement") == "Agreement 100 %"
    pages[1].click("#agreement")
    keep_picture(pages[1], "agreement")
    output = server.end()
    assert "pairs ordered alike 1.00 [1.00, 1.00]" in output
    assert [row["annotator"] for row in server.rankings()] == ["Ann", "Bob"] * 3


def test_a_second_tab_that_is_behind_says_so_and_goes_on(serve, open_page):
    server = serve(rows(2))
    page = open_page(server, "Ann")
    second = page.context.new_page()
    second.goto(server.address)
    second.wait_for_selector(".card")
    press_shortest_first(page)
    ranked(page, 1)
    for key in "10":  # the rest tie
        second.keyboard.press(key)
    second.keyboard.press("Enter")
    second.wait_for_selector("#banner:not([hidden])")
    assert "judged already" in second.inner_text("#banner")
    assert "Question 1" in second.inner_text("#prompt")
    keep_picture(second, "second-tab")
    server.end()
    assert len(server.rankings()) == 1


def test_a_kill_loses_nothing_and_the_page_goes_on_by_itself(serve, open_page):
    """1,000 prompts; the server is killed after a submission, and while a person writes."""
    server = serve(rows(1000))
    page = open_page(server, "Ann")
    for number in range(1, 6):
        press_shortest_first(page)
        ranked(page, number)
    page.keyboard.press("1")
    page.keyboard.press("e")
    page.locator("#demonstration").fill("Half a sent")
    server.kill()
    assert len(Store(server.folder / "answers.rankings.sqlite").judgements()) == 5
    page.click("text=Keep")
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    page.wait_for_selector("#banner:not([hidden])")
    assert "trying again" in page.inner_text("#banner")
    keep_picture(page, "no-server")
    server.start()
    ranked(page, 6)
    assert page.locator("#banner").is_hidden()
    page.keyboard.press("2")
    page.close()
    again = page.context.new_page()  # the name and the draft are remembered
    again.goto(server.address)
    again.wait_for_selector(".card")
    assert again.inner_text("#order").split()[:2] == ["Best", "2"]
    server.end()
    assert [len(set(row["ranks"])) for row in server.rankings()] == [3] * 5 + [2]
    written = (server.folder / "answers.rankings.demonstrations.jsonl").read_text()
    assert "Half a sent" in written


def test_a_person_plays_both_sides_of_a_conversation(serve, open_page):
    server = serve(rows(2))
    page = open_page(server, "Ann")
    page.keyboard.press("w")
    page.keyboard.type("What is 1 + 1?")
    page.keyboard.press("Tab")
    page.keyboard.type("It is 2.")
    page.reload()
    page.wait_for_selector(".card")
    page.keyboard.press("w")
    assert page.locator("#turns textarea").nth(1).input_value() == "It is 2."
    page.click("#more")
    assert page.locator("#save").is_disabled()
    page.keyboard.type("And 2 + 2?")
    page.locator("#turns textarea").nth(3).fill("4")
    keep_picture(page, "write")
    page.click("#save")
    page.wait_for_selector("#write-dialog", state="hidden")
    server.end()
    written = (server.folder / "answers.rankings.conversations.jsonl").read_text()
    said = [message["content"] for message in json.loads(written)["messages"]]
    assert said == ["What is 1 + 1?", "It is 2.", "And 2 + 2?", "4"]


@pytest.mark.parametrize("width", [320, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(serve, open_page, width, scheme):
    long_word = "antidisestablishmentarianism" * 5
    answers = [long_word, "| a | b |\n|---|---|\n| " + long_word + " | 2 |", "```\n" + "x " * 99]
    server = serve([{"prompt": long_word, "responses": [*answers, *"abcdef"]}])
    phone = {"width": width, "height": 700}
    page = open_page(server, "Ann", viewport=phone, color_scheme=scheme, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator(".card").first.tap()
    assert page.inner_text("#order").split()[:2] == ["Best", "1"]
    keep_picture(page, f"phone-{width}-{scheme}")
