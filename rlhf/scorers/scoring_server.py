"""Serving a scorer over HTTP: `python -m rlhf.score path=<reward model> serve=127.0.0.1:8123`.

It answers the requests of `rlhf.scorers.remote`, one at a time, and says in one line what is wrong
with a request. The server is that of the standard library. Left out: keys, TLS and several
processes, which a proxy before it adds.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlhf.config import InputError, one_line
from rlhf.data import DropRow, as_prompt
from rlhf.http_endpoint import MOST_BYTES
from rlhf.scorers.call import Scorer, score_responses


class ScoreServer(ThreadingHTTPServer):
    """A scorer that listens; `serve_forever()` answers until `shutdown()`.

    Attributes:
        url: where it is asked.
        num_scored: responses so far.
    """

    daemon_threads = True

    def __init__(self, scorer: Scorer | None, address: str, name: str):
        """Listen at an address such as `127.0.0.1:8123`; port 0 takes a free one."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise InputError(f"serve={address} is no address; give serve=127.0.0.1:8123")
        self.scorer: Any = scorer
        self.name, self.num_scored = name, 0
        self.lock = threading.Lock()
        try:
            super().__init__((host, int(port)), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            fix = "give another port, e.g. serve=127.0.0.1:8124"
            raise InputError(f"serve={address} cannot be used ({reason}); {fix}") from error
        self.url = f"http://{host}:{self.server_port}/score"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Show what went wrong, unless the other side has gone."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def scores(self, body: Any) -> list[float]:
        """Scores of the prompts and responses of a request."""
        prompts, responses, columns = _read(body)
        with self.lock:
            name = "the scorer"
            scores = score_responses(self.scorer, prompts, responses, name, columns=columns)
            self.num_scored += len(responses)
        return scores.total.tolist()


def _read(body: Any) -> tuple[list[Any], list[str], dict[str, list[Any]]]:
    fields = body if isinstance(body, dict) else {}
    prompts, responses = fields.get("prompts"), fields.get("responses")
    columns = fields.get("columns") or {}
    if not isinstance(prompts, list) or not isinstance(responses, list):
        raise InputError('expected {"prompts": [...], "responses": [...]}')
    if not all(isinstance(response, str) for response in responses):
        raise InputError("`responses` must be texts")
    if not isinstance(columns, dict) or not all(isinstance(c, list) for c in columns.values()):
        raise InputError('`columns` must be {"name": [...]}')
    try:
        for number, prompt in enumerate(prompts):
            as_prompt(prompt, f"prompts[{number}]")
    except DropRow as reason:
        raise InputError(f"`prompts` has {reason}, which no scorer reads") from reason
    sizes = {len(values) for values in (prompts, responses, *columns.values())}
    if len(sizes) != 1:
        raise InputError(f"prompts, responses and columns differ in number: {sorted(sizes)}")
    return prompts, responses, columns


class _Handler(BaseHTTPRequestHandler):
    server: ScoreServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds for the next byte of a request

    def do_GET(self) -> None:
        self._answer(200, {"scorer": self.server.name})

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 <= length <= MOST_BYTES:
                raise ValueError(f"a body of {length:,} bytes")
            body = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError) as error:
            self.close_connection = True
            return self._answer(400, {"error": f"expected JSON with its length: {error}"})
        try:
            self._answer(200, {"scores": self.server.scores(body)})
        except InputError as error:
            self._answer(422, {"error": str(error)})
        except Exception as error:
            self._answer(500, {"error": one_line(error)})
            raise

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing about each request."""
