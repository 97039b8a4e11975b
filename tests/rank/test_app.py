"""The web page without a browser: what it is sent, what it may ask, who is let in.

Run: python -m pytest tests/rank/test_app.py
"""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import time
import urllib.request

import pytest
from helpers.endpoints import open_here
from starlette.testclient import TestClient

import rlhf.rank.app
from rlhf.rank.app import PAGE, make_app
from rlhf.rank.store import Store, Task
from rlhf.web.render import LONGEST, to_html
from rlhf.web.server import server_of

MARKUP = (
    "<script>alert(1)</script> <img src=x onerror=alert(1)> ![i](http://e.vil/pixel.png) "
    "[link](javascript:alert(1)) [data](data:text/html,x) [good](https://example.org) "
    "<https://example.org/?a=b> \x1b[31m\u202ereversed &#x202e; `</code><b>`\n\n<div onclick=x>"
)


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path / "rankings.sqlite")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chat.append({"role": "user", "content": "Name **one** tool."})
    answers = ["A hammer.", MARKUP, "مرحبا"]
    secret = ["secret/sft", "secret/ppo", "secret/ppo"]
    store.add(Task(i, chat, answers, secret, {"id": "secret"}) for i in range(3))
    return store


def client(store: Store, **options) -> TestClient:
    return TestClient(make_app(store, **options), base_url="http://127.0.0.1:8765")


def ask(page: TestClient, name: str, annotator: str = "ann", **body) -> dict:
    answer = page.post(f"/api/{name}", json={"annotator": annotator, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_ranking_is_taken_and_the_next_prompt_comes(store):
    page = client(store)
    first = ask(page, "next")["task"]
    second = ask(page, "submit", token=first["token"], kind="ranking", ranks=[2, 0, 1])
    assert second["task"]["number"] == 2 and second["progress"]["ranked"] == 1
    assert store.judgements()[0].kind == "ranking"
    back = ask(page, "undo")
    assert back["task"]["number"] == 1 and back["task"]["before"]["ranks"] == [2, 0, 1]


def test_two_tabs_cannot_submit_twice(store):
    tabs = [client(store), client(store)]
    task, same = (ask(tab, "next")["task"] for tab in tabs)
    assert task["token"] == same["token"]
    ask(tabs[0], "submit", token=task["token"], kind="ranking", ranks=[0, 1, 2])
    body = {"annotator": "ann", "token": task["token"], "kind": "ranking", "ranks": [2, 1, 0]}
    late = tabs[1].post("/api/submit", json=body)
    assert late.status_code == 409 and "judged already" in late.json()["error"]
    assert len(store.judgements()) == 1


def test_names_of_models_and_other_columns_do_not_reach_the_browser(store):
    page = client(store)
    task = ask(page, "next")
    report = page.post("/api/report", json={"annotator": "ann"}).text
    assert "secret" not in json.dumps(task) + report


def test_markup_of_a_model_is_text(store):
    cards = ask(client(store), "next")["task"]["cards"]
    (html,) = [card["html"] for card in cards if "alert" in card["text"]]
    for forbidden in ("<script", "<img", "<div", "<b>", 'javascript:alert(1)"', 'data:text/html"'):
        assert forbidden not in html
    assert 'href="https://example.org" target="_blank" rel="noopener' in html
    assert "\x1b" not in html and "\u202e" not in html and html.count("[U+202E]") == 2


def test_a_very_long_answer_is_shown_as_it_is():
    html = to_html("<i>[" * LONGEST)
    assert html.startswith("<pre>&lt;i&gt;[") and "<i>" not in html


def test_the_files_of_the_page_have_no_code_in_them_that_its_policy_forbids(store):
    page = client(store)
    for name in ("", "base.css", "base.js", *(file.name for file in PAGE.iterdir())):
        answer = page.get(f"/{name}")
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'" in policy and "unsafe" not in policy
    html = (PAGE / "index.html").read_text()
    assert "<style" not in html and "style=" not in html and "onclick" not in html
    assert html.count("<script") == html.count(" defer></script>") == 4
    assert page.get("/store.py").status_code == page.get("/../store.py").status_code == 404


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.0.7", ""])
def test_a_request_that_names_another_host_is_refused(store, host):
    assert client(store).get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1", "[::1]:8765"])
def test_names_of_this_machine_are_served_also_through_a_tunnel(store, host):
    headers = {"host": host, "origin": f"http://{host}"}
    assert client(store).post("/api/next", json={"annotator": "a"}, headers=headers).is_success


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_other_web_sites_cannot_judge(store, headers):
    page = client(store)
    token = ask(page, "next")["task"]["token"]
    body = {"annotator": "ann", "token": token, "kind": "skip"}
    assert page.post("/api/submit", json=body, headers=headers).status_code == 403
    plain = {"content-type": "text/plain"}
    assert page.post("/api/submit", content=json.dumps(body), headers=plain).status_code == 409
    assert store.judgements() == []


def test_with_a_token_only_browsers_that_were_opened_with_it_are_let_in(store):
    page = client(store, host="0.0.0.0", token="long secret")
    assert page.get("/").status_code == 401
    assert page.post("/api/next", json={"annotator": "ann"}).status_code == 401
    assert page.get("/?token=other").status_code == 401
    opened = page.get("/?token=long%20secret", headers={"host": "192.168.0.7:8765"})
    assert opened.status_code == 421 or opened.history  # the cookie belongs to the named host
    opened = page.get("/?token=long%20secret")
    assert opened.status_code == 200 and str(opened.url).endswith(":8765/")
    assert "httponly" in opened.history[0].headers["set-cookie"].lower()
    assert "secret" not in opened.history[0].headers["set-cookie"]
    assert ask(page, "next")["task"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ('{"annotator": "ann"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "Give a name"),
        (json.dumps({"annotator": "x" * 61}), "at most 60 characters"),
        (json.dumps({"annotator": "ann", "kind": "ranking", "ranks": ["0"]}), "whole numbers"),
        (json.dumps({"annotator": "ann", "x": "y" * 2_000_000}), "too long"),
    ],
)
def test_a_request_that_cannot_be_read_gets_one_clear_line(store, content, message):
    headers = {"content-type": "application/json"}
    answer = client(store).post("/api/submit", content=content, headers=headers)
    assert answer.status_code == 409 and message in answer.json()["error"]


def test_a_browser_that_disappears_in_a_request_is_no_traceback_and_stops_nobody(store, capfd):
    """Half of a request comes; then the connection ends, or is still open when the server ends."""
    head = b"POST /api/submit HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += b'Content-Length: 500\r\n\r\n{"annotator": "ann"'
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = server_of(make_app(store))
        server.config.timeout_graceful_shutdown = 0.2
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        address = listener.getsockname()
        with socket.create_connection(address) as waits, socket.create_connection(address) as gone:
            waits.sendall(head)
            gone.sendall(head)
            time.sleep(0.2)
            gone.close()
            body = json.dumps({"annotator": "ann"}).encode()
            request = urllib.request.Request(f"http://127.0.0.1:{address[1]}/api/next", body)
            request.add_header("Content-Type", "application/json")
            with open_here(request, timeout=300) as answer:
                assert json.load(answer)["task"]["number"] == 1
            assert capfd.readouterr().err == ""
            server.should_exit = True
            thread.join()
            waits.settimeout(300)
            assert b"503 Service Unavailable" in waits.recv(1000)
    assert "Traceback" not in capfd.readouterr().err
    assert store.judgements() == []


def test_only_listed_annotators_may_rank(store):
    page = client(store, annotators=["ann"])
    assert ask(page, "next")["task"]
    refused = page.post("/api/next", json={"annotator": "eve"})
    assert "eve is not one of the annotators" in refused.json()["error"]


def test_half_a_surrogate_pair_that_a_person_typed_can_be_exported(store):
    page = client(store)
    token = ask(page, "next")["task"]["token"]
    content = '{"annotator": "ann", "token": "%s", "kind": "skip", "demonstration": "a\\ud83d"}'
    headers = {"content-type": "application/json"}
    assert page.post("/api/submit", content=content % token, headers=headers).is_success
    assert store.judgements()[0].demonstration == "a\ufffd"


def test_a_conversation_that_a_person_wrote_is_taken(store):
    turns = [{"role": "user", "content": "Hi", "x": 1}, {"role": "assistant", "content": "Hello"}]
    page = client(store)
    assert ask(page, "write", token="1", messages=turns) == {}
    del turns[0]["x"]
    assert store.conversations()[0]["messages"] == turns
    for bad in (None, "Hi", ["Hi"], turns[:1]):
        body = {"annotator": "ann", "token": "2", "messages": bad}
        assert page.post("/api/write", json=body).status_code == 409
    assert len(store.conversations()) == 1


def test_agreement_is_live(store):
    store.overlap = 2
    page = client(store)
    for name in ("ann", "bob"):
        for _ in range(3):
            task = ask(page, "next", name)["task"]
            ranks = [len(card["text"]) for card in task["cards"]]
            ask(page, "submit", name, token=task["token"], kind="ranking", ranks=ranks)
    report = ask(page, "report")
    assert report["pairwise"] == [1, 1, 1] and report["alpha"][0] == 1
    assert [one["name"] for one in report["annotators"]] == ["ann", "bob"]


def test_a_store_that_cannot_write_says_so_and_the_browser_tries_again(store, monkeypatch):
    def full(*values, **more):
        raise sqlite3.OperationalError("database or disk is full")

    page = client(store)
    token = ask(page, "next")["task"]["token"]
    monkeypatch.setattr(store, "submit", full)
    answer = page.post("/api/submit", json={"annotator": "ann", "token": token, "kind": "skip"})
    assert answer.status_code == 503 and "disk is full" in answer.json()["error"]


def test_files_are_exported_at_the_start_after_changes_and_at_the_end(store, monkeypatch):
    exported: list[int] = []
    monkeypatch.setattr(rlhf.rank.app, "EXPORT_SECONDS", 0.01)

    def wait_for(*numbers: int) -> None:
        ends = time.monotonic() + 300
        while exported != [*numbers] and time.monotonic() < ends:
            time.sleep(0.01)
        assert exported == [*numbers]

    with client(store, export=lambda: exported.append(len(store.judgements()))) as page:
        wait_for(0)
        token = ask(page, "next")["task"]["token"]
        ask(page, "submit", token=token, kind="skip")
        wait_for(0, 1)
    assert exported == [0, 1, 1]
