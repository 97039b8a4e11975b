"""The page of `rlhf.chat web=true` in a real browser, on the real command and tiny models.

Needs chromium (apt-get install chromium) and playwright. Run: python -m pytest -m slow
tests/commands/test_chat_browser.py; SCREENSHOTS=<folder> keeps pictures to look at.
"""

from __future__ import annotations

import json

import pytest
from helpers.browsers import Served, keep_picture, launched, pages, servers
from helpers.chat_models import EOS, scripted, write

pytestmark = pytest.mark.slow
LONG = {"max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def browser():
    yield from launched()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models that say one thing each, and one that does not end."""
    folder = tmp_path_factory.mktemp("chat")
    write(folder / "sft", scripted("orange" + EOS, **LONG))
    write(folder / "ppo", scripted("<b>*red" + EOS, **LONG))
    write(folder / "endless", scripted("abc", **LONG))
    return folder


started = pytest.fixture(servers)
opened = pytest.fixture(pages)


@pytest.fixture
def serve(folder, started):
    def start(*arguments):
        started.append(Served(folder, "rlhf.chat", "web=true", "temperature=0.001", *arguments))
        return started[-1]

    return start


@pytest.fixture
def open_page(opened):
    def start(server, **options):
        page = opened(server, **options)
        page.wait_for_selector("#models li")
        return page

    return start


def ask(page, question):
    page.keyboard.type(question)
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop", state="hidden")


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_with_the_keyboard_alone_the_better_answer_is_marked_and_the_talk_goes_on(
    serve, open_page, folder
):
    server = serve("path=[sft,ppo]", "out=keyboard.jsonl")
    page = open_page(server)
    keep_picture(page, "chat-begin")
    ask(page, "A fruit?")
    page.wait_for_selector(".card-foot")
    assert [one.inner_text() for one in page.locator(".card .text").all()] == ["orange", "<b>*red"]
    page.keyboard.press("Escape")
    page.keyboard.press("2")
    page.locator("#saved", has_text="1 ranking in keyboard.jsonl").wait_for()
    assert "goes on from this one" in page.locator(".card").nth(1).inner_text()
    keep_picture(page, "chat-marked")
    page.keyboard.press("/")
    ask(page, "And a tool?")
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    page.locator("#saved", has_text="2 rankings").wait_for()
    page.reload()  # the conversation is there again
    page.locator(".round").nth(1).wait_for()
    assert "2 rankings in keyboard.jsonl" in server.end()
    first, second = rows_of(folder, "keyboard.jsonl")
    assert first["ranks"] == [1, 0] and second["ranks"] == [0, 1]
    said = [turn["content"] for turn in second["prompt"]]
    assert said == ["A fruit?", "<b>*red", "And a tool?"]


def test_an_answer_stops_and_another_one_makes_a_ranking(serve, open_page, folder):
    server = serve("path=endless", "response_length=4000", "out=endless.jsonl")
    page = open_page(server)
    page.keyboard.type("On and on?")
    page.keyboard.press("Enter")
    page.locator(".card.writing", has_text="abcabc").wait_for()
    keep_picture(page, "chat-writing")
    page.keyboard.press("Escape")
    page.wait_for_selector("#stop", state="hidden")
    page.click("text=Bad")
    page.locator(".after", has_text="needs a second answer").wait_for()
    page.click("#another")
    page.locator(".card.writing", has_text="abcabcabcabc").wait_for()
    page.click("#stop")
    page.locator(".card").nth(1).locator("text=Better").click()
    page.locator("#saved", has_text="1 ranking").wait_for()
    page.keyboard.press("n")
    page.wait_for_selector("#intro:not([hidden])")
    page.click("#undo")
    page.locator(".card").nth(1).wait_for()
    server.end()
    assert rows_of(folder, "endless.jsonl")[0]["ranks"] == [1, 0]


def test_a_server_that_ends_loses_neither_the_question_nor_the_talk(serve, open_page):
    server = serve("path=sft", "out=killed.jsonl")
    page = open_page(server)
    ask(page, "A fruit?")
    page.wait_for_selector(".card-foot")
    server.kill()
    ask(page, "A tool?")
    page.wait_for_selector("#banner:not([hidden])")
    assert page.input_value("#question") == "A tool?"
    server.start()
    page.keyboard.press("Enter")
    page.locator(".card-foot").nth(1).wait_for()
    assert page.locator("#banner").is_hidden()


def test_a_mark_that_the_server_did_not_get_is_sent_again(serve, open_page, folder):
    server = serve("path=[sft,ppo]", "out=late.jsonl")
    page = open_page(server)
    ask(page, "A fruit?")
    page.wait_for_selector(".card-foot")
    server.kill()
    page.keyboard.press("Escape")
    page.keyboard.press("2")
    page.locator("#banner", has_text="The server does not answer").wait_for()
    server.start()
    page.locator("#saved", has_text="1 ranking in late.jsonl").wait_for()
    assert page.locator("#banner").is_hidden()
    assert rows_of(folder, "late.jsonl")[0]["ranks"] == [1, 0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(serve, open_page, scheme):
    server = serve("path=[sft,ppo]", f"out=phone-{scheme}.jsonl")
    size = {"width": 390, "height": 780}
    page = open_page(server, viewport=size, color_scheme=scheme, has_touch=True)
    ask(page, "A_very_long_word" * 9)
    page.locator(".card-foot").nth(1).wait_for()
    page.get_by_label("Answer 2: better").tap()
    page.locator(".card.best", has_text="red").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    keep_picture(page, f"chat-phone-{scheme}")
