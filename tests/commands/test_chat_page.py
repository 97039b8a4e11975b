"""The page of `rlhf.chat web=true` without a browser: what is streamed, what is kept, who asks.

The guard itself is tested in tests/rank/test_app.py.
Run: python -m pytest tests/commands/test_chat_page.py
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from helpers.chat_models import EOS, scripted, write
from starlette.testclient import TestClient

from rlhf.chat import ChatOptions
from rlhf.chat.__main__ import run
from rlhf.chat.rankings import Rankings
from rlhf.chat.web import PAGE, Room, make_app
from rlhf.config import DatasetConfig, InputError
from rlhf.data import load_splits
from rlhf.option_parser import read_options
from rlhf.policy import PolicyOptions


class Speaker:
    """Says its words one by one, as a `Chat` does."""

    why_text, temperature, cut_off, options = None, 1.0, False, PolicyOptions("any")

    def __init__(self, path: str, words: str):
        self.path, self.words, self.note = path, words.split(" "), print
        self.rounds, self.log, self.closed = [], [], 0

    def reset(self):
        self.rounds = []

    def ask(self, question, number):
        self.log.append((question, number, list(self.rounds)))
        self.note("[the context is full]") if question == "Long?" else None
        try:
            for i, word in enumerate(self.words):
                if question == "Fail?" and i:
                    raise RuntimeError("CUDA out of memory\nsecond line")
                yield word if not i else f" {word}"
        finally:
            self.closed += 1


@pytest.fixture
def speakers():
    return [Speaker("secret/sft", "An apple."), Speaker("secret/ppo", "A red **one** <b>")]


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "rankings.jsonl"


def page_of(chats, out, **options) -> TestClient:
    return TestClient(make_app(chats, Rankings(out), **options), base_url="http://127.0.0.1:8766")


def events(answer) -> list[dict]:
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    return [json.loads(part.removeprefix("data: ")) for part in answer.text.split("\n\n") if part]


def asked(question="A fruit?", before=(), models=(0, 1), number=3) -> dict:
    return {"question": question, "before": before, "models": models, "number": number}


def marked(marks, texts=("An apple.", "A car."), name="q1", before=()) -> dict:
    answers = [{"model": i, "text": text} for i, text in enumerate(texts)]
    return {
        "id": name,
        "question": "A fruit?",
        "before": before,
        "answers": answers,
        "marks": marks,
    }


def test_the_answers_of_two_models_come_in_turn_as_they_are_sampled(speakers, out):
    found = events(page_of(speakers, out).post("/api/ask", json=asked(before=[["Hi", "Ho"]])))
    pieces = [(one["model"], one["text"]) for one in found if "text" in one]
    assert pieces == [
        (0, "An"),
        (1, "A"),
        (0, " apple."),
        (1, " red"),
        (1, " **one**"),
        (1, " <b>"),
    ]
    assert [one["model"] for one in found if one.get("done")] == [0, 1]
    assert [one.log for one in speakers] == [[("A fruit?", 3, [("Hi", "Ho")])]] * 2


def test_remarks_and_failures_reach_the_page(speakers, out):
    page = page_of(speakers, out)
    assert {"model": 1, "note": "the context is full"} in events(
        page.post("/api/ask", json=asked("Long?", models=[1]))
    )
    *_, last = events(page.post("/api/ask", json=asked("Fail?")))
    assert last == {"error": "The answer broke off: CUDA out of memory"}
    assert len(events(page.post("/api/ask", json=asked()))) == 8  # and it goes on


def test_a_browser_that_goes_away_stops_the_answer_and_lets_the_next_one_begin(speakers, out):
    async def two_browsers():
        room = Room(speakers, Rankings(out))
        first = room.events("A fruit?", [], [0, 1], 0)
        await anext(first)
        second = room.events("A tool?", [], [0], 1)
        waits = json.loads((await anext(second)).removeprefix("data: "))
        begun = asyncio.ensure_future(anext(second))
        await asyncio.sleep(0)
        assert not begun.done() and "yours comes next" in waits["note"]
        await first.aclose()
        assert speakers[0].closed == 1
        assert json.loads((await begun).removeprefix("data: ")) == {"model": 0, "text": "An"}
        await second.aclose()

    asyncio.run(two_browsers())


def test_texts_are_rendered_without_their_html(speakers, out):
    answer = page_of(speakers, out).post("/api/render", json={"texts": ["**a** <b>\u202e"]}).json()
    [text] = answer["texts"]
    assert "<strong>a</strong> &lt;b&gt;[U+202E]" in text["html"]


def test_a_mark_becomes_a_row_that_the_reward_stage_reads(speakers, out):
    page = page_of(speakers, out)
    assert page.post("/api/mark", json=marked([0, 1])).json() == {"rows": 1, "kept": True}
    turns = [["Hi", "Ho"]]
    assert page.post("/api/mark", json=marked([1, -1, 0][:2], name="q2", before=turns)).is_success
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "A fruit?"}],
        "responses": ["An apple.", "A car."],
        "ranks": [1, 0],
        "models": ["secret/sft", "secret/ppo"],
        "id": "q1",
    }
    assert [turn["content"] for turn in rows[1]["prompt"]] == ["Hi", "Ho", "A fruit?"]
    splits = load_splits(DatasetConfig(path=str(out)), "reward", 1)
    assert len(splits.train + splits.eval) == 2 and not splits.dropped


def test_a_mark_may_change_or_be_taken_back_and_a_restart_goes_on(speakers, out):
    page = page_of(speakers, out)
    for marks in ([1, 0], [0, 1]):
        page.post("/api/mark", json=marked(marks))
    assert [json.loads(line)["ranks"] for line in out.read_text().splitlines()] == [[1, 0]]
    page.post("/api/mark", json=marked([1, -1], name="q2"))
    again = page_of(speakers, out)
    assert again.post("/api/about", json={}).json()["rows"] == 2
    assert again.post("/api/mark", json=marked([0, 0])).json() == {"rows": 1, "kept": False}
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["q2"]


@pytest.mark.parametrize(
    ("marks", "texts"), [([1], ["A"]), ([1, 1], "AB"), ([1, 0], "AA"), ([1, 0], ["A", " "])]
)
def test_what_orders_nothing_is_no_row(speakers, out, marks, texts):
    page = page_of(speakers, out)
    assert page.post("/api/mark", json=marked(marks, texts)).json() == {"rows": 0, "kept": False}
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("ask", asked(" "), "Write a question first"),
        ("ask", asked(models=[2]), "no such model"),
        ("ask", asked(models=[0, 0]), "each model once"),
        ("ask", asked(models=[]), "each model once"),
        ("ask", asked(number=-1), "whole number"),
        ("ask", asked(before=[["Hi"]]), "not a question and an answer"),
        ("ask", asked(before="Hi"), "not a list of rounds"),
        ("mark", marked([2, 0]), "A mark is 1, 0 or -1"),
        ("mark", marked([1]), "a mark for each answer"),
        ("mark", marked([1, 0], name=""), "lacks its question"),
        ("mark", marked([1, 0, 0], "ABC"), "no such model"),
        ("render", {"texts": [1]}, "not a list of texts"),
    ],
)
def test_a_request_that_makes_no_sense_gets_one_clear_line(speakers, out, name, body, message):
    answer = page_of(speakers, out).post(f"/api/{name}", json=body)
    assert answer.status_code == 409 and message in answer.json()["error"]


def test_other_web_sites_can_neither_ask_nor_mark(speakers, out):
    page = page_of(speakers, out)
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert page.post("/api/ask", json=asked(), headers=headers).status_code == 403
        assert page.post("/api/mark", json=marked([1, 0]), headers=headers).status_code == 403
    assert page.post("/api/ask", json=asked(), headers={"host": "evil.example"}).status_code == 421
    assert not speakers[0].log and not out.exists()
    locked = page_of(speakers, out, token="long secret")
    assert locked.post("/api/ask", json=asked()).status_code == 401
    assert locked.get("/?token=long%20secret").status_code == 200
    assert "rlhf_chat" in locked.cookies and locked.post("/api/ask", json=asked()).is_success


def test_the_files_of_the_page_have_no_code_in_them_that_its_policy_forbids(speakers, out):
    page = page_of(speakers, out)
    for name in ("", "base.css", "base.js", *(file.name for file in PAGE.iterdir())):
        assert page.get(f"/{name}").status_code == 200
    html = (PAGE / "index.html").read_text()
    assert "<style" not in html and "style=" not in html and "onclick" not in html
    assert html.count("<script") == html.count(" defer></script>") == 2
    assert "innerHTML" not in (PAGE / "chat.js").read_text()


def test_a_restart_reads_answers_with_any_separator_of_lines_in_them(speakers, out):
    texts = ("One\u2028two\x85three\x0b", "A car.\x00")
    assert page_of(speakers, out).post("/api/mark", json=marked([1, 0], texts)).is_success
    (row,) = Rankings(out).rows.values()
    assert row["responses"] == [text.strip() for text in texts]


def test_a_file_of_something_else_is_refused(out):
    out.write_text('{"prompt": "A", "responses": ["B", "C"], "ranks": [0, 1]}\n{"text": "A"}\n')
    with pytest.raises(InputError, match="line 2 is no ranking; give another out=<file>"):
        Rankings(out)


def test_two_real_models_answer_in_the_page_and_the_command_says_what_was_kept(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, text in (("a", "abc"), ("b", "xyz")):
        write(tmp_path / name, scripted(text + EOS))

    def visit(app, taken):
        page = TestClient(app, base_url="http://127.0.0.1")
        about = page.post("/api/about", json={}).json()["models"]
        assert about == [{"name": name, "about": "", "varies": False} for name in "ab"]
        found = events(page.post("/api/ask", json=asked("Hi")))
        texts = [
            "".join(o["text"] for o in found if o["model"] == i and "text" in o) for i in (0, 1)
        ]
        assert texts == ["abc", "xyz"]
        page.post("/api/mark", json=marked([0, 1], texts))

    monkeypatch.setattr("rlhf.chat.serving.serve", visit)
    run(read_options(ChatOptions, ["path=[a,b]", "web=true", "port=0", "temperature=0"]))
    output = capsys.readouterr().out
    assert "chat at http://127.0.0.1:" in output and "1 rankings in chat.rankings.jsonl" in output
    assert "next: python -m rlhf.reward dataset=ranked dataset.path=chat.rankings.jsonl" in output
    assert json.loads(Path("chat.rankings.jsonl").read_text())["models"] == ["a", "b"]


def test_a_caller_in_python_may_give_one_path(tmp_path):
    options = ChatOptions(path="a", compare="b")
    assert options.models == {"path": "a", "compare": "b"}
    assert read_options(ChatOptions, ["path=[a,b]"]).models == {"path": "a", "path[1]": "b"}
