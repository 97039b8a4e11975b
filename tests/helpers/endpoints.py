"""HTTP servers in this process: a scorer's, and one that answers what a test tells it to."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# asks a server of this machine, past a proxy that the environment names
open_here = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@contextmanager
def running(server: Any) -> Iterator[Any]:
    """Have a server answer inside the block, until all that the block has asked is answered: a
    thread that outlived it would try again, and say so in the middle of another test."""
    before = {*threading.enumerate()}
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        for asking in {*threading.enumerate()} - before:
            if asking.name.startswith("ThreadPoolExecutor"):
                asking.join(300)
        server.shutdown()
        server.server_close()
        thread.join()


TOO_LATE = object()  # an answer that comes when the client has gone


class Answers(ThreadingHTTPServer):
    """Answers each request by the next of `answers`, the last one again and again.

    An answer is a function of the request's JSON, or what is sent as it is: (status, body), or None
    for a connection that is closed without a word, or `TOO_LATE`.

    Attributes:
        requests: (path, headers, JSON) of each request.
    """

    daemon_threads = True
    request_queue_size = 128  # a full queue costs a client a second

    def __init__(self, *answers: Any):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests = list(answers), []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/score"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that waits no longer has gone."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        answer = answer(body) if isinstance(answer, Callable) else answer
        if answer is TOO_LATE:
            self.rfile.read(1)  # returns when the client closes the connection
        if answer is None or answer is TOO_LATE:
            return
        status, content, *headers = answer
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or [{}])[0].items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def words(body: dict[str, Any]) -> tuple[int, Any]:
    """Score each response by its number of words."""
    return 200, {"scores": [len(text.split()) for text in body["responses"]]}
