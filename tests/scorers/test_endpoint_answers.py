"""What endpoints answer, from chat models to broken proxies: read, tried again, or named.

Run: python -m pytest tests/scorers/test_endpoint_answers.py
"""

from __future__ import annotations

import socket
import threading
import time
from types import SimpleNamespace

import pytest
from helpers.endpoints import Answers, running

import rlhf.http_endpoint
from rlhf.config import EndpointConfig, InputError
from rlhf.http_endpoint import Completion, complete_chat


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Seconds that the client would have slept."""
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=slept.append)
    monkeypatch.setattr(rlhf.http_endpoint, "time", clock)
    return slept


def asked(url: str, **endpoint) -> Completion:
    config = EndpointConfig(**({"retries": 2} | endpoint))
    return complete_chat(url, {"model": "m"}, config, "url")


def choice(content, **more) -> dict:
    return {"message": {"role": "assistant", "content": content}} | more


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"choices": [choice("first"), choice("second")]}, "first"),
        ({"choices": [choice(None)]}, ""),
        ({"choices": [choice("")]}, ""),
        ({"choices": [choice([{"type": "text", "text": "a"}, {"type": "image_url"}])]}, "a"),
        ({"choices": [choice("\x00\u202e<b>")], "usage": None}, "\x00\u202e<b>"),
    ],
    ids=str,
)
def test_the_first_choice_is_read(answer, text):
    with running(Answers((200, answer, {"Content-Type": "text/html"}))) as server:
        assert asked(server.url) == Completion(text, True, 0, 0)


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": []},
        {"choices": None},
        {"choices": [{}]},
        {"choices": [choice(5)]},
        {"choices": [choice({"text": "a"})]},
        {"choices": [choice([5])]},
        {"choices": [choice("a")], "usage": {"prompt_tokens": "many"}},
        {"choices": [choice("a")], "usage": [1]},
        {"error": {"message": "overloaded"}},
        [],
        None,
        "text",
    ],
    ids=str,
)
def test_what_is_no_completion_is_named(answer):
    with running(Answers((200, answer))) as server, pytest.raises(InputError) as caught:
        asked(server.url)
    assert str(caught.value).endswith("; expected a chat completion")
    assert str(caught.value).startswith(f"url={server.url} answered ")


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (None, [1.0, 2.0]),
        ("7", [7.0, 7.0]),
        ("86400", [60.0, 60.0]),
        ("Wed, 21 Oct 2026 07:28:00 GMT", [1.0, 2.0]),
        ("-1", [1.0, 2.0]),
        ("\u00b2", [1.0, 2.0]),
    ],
)
def test_after_429_the_client_waits_as_it_is_told_or_longer_each_time(after, expected, waits):
    headers = {} if after is None else {"Retry-After": after}
    with running(Answers((429, b"slow down", headers))) as server:
        with pytest.raises(InputError, match=r"answered 429 .*: 'slow down' \(after 3 tries\)"):
            asked(server.url)
    assert waits == expected


@pytest.mark.parametrize("status", [200, 400, 503])
def test_lists_nested_too_deeply_are_no_json(status, waits):
    with running(Answers((status, b"[" * 100_000))) as server:
        with pytest.raises(InputError, match=r"(not JSON|answered \d+) .*'\[\[\["):
            asked(server.url)


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 400 No\r\nContent-Length: 9999\r\n\r\n"]
)
def test_an_answer_that_comes_drop_by_drop_has_no_more_time_than_a_late_one(head, waits):
    def drip():
        connection, _ = listener.accept()
        connection.recv(10_000)
        connection.sendall(head)
        try:
            while not done.wait(0.05):
                connection.sendall(b"[")
        except OSError:
            pass
        connection.close()

    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        began = time.monotonic()
        with pytest.raises(InputError, match="did not answer within 0.3 s|answered 400 No"):
            asked(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3, retries=0)
        assert time.monotonic() - began < 60
        done.set()
        thread.join()
