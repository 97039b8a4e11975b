"""A server that answers as vLLM does, in this process: it reads weights from a folder and samples
with them. The fields of requests and answers are those of vLLM 0.32; `test-vllm` runs the real one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from helpers.endpoints import running
from transformers import AutoModelForCausalLM

MODELS = {"object": "list", "data": [{"id": "policy", "max_model_len": 128}]}


class FakeVLLM(ThreadingHTTPServer):
    """Attributes:
    model: what samples; set by `reload_weights`.
    requests: (path, JSON) of each request.
    fault: takes path and JSON of a request; what it returns is the answer, (status, body), or
        "die" for a closed connection; None: the server answers as it should.
    raw: log-probs are those of the logits, at temperature 1.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, tokenizer: Any = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokenizer, self.model, self.raw = tokenizer, None, False
        self.requests, self.fault = [], lambda path, body: None
        self.lock = threading.Lock()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, MODELS
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            folder = body["kwargs"]["weights_path"]
            self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        if path == "/v1/completions":
            return 200, self.complete(body)
        return 404, {"detail": "Not Found"}

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["model"] == "policy" and body["ignore_eos"] and body["return_token_ids"]
        assert body["temperature"] <= 2.0  # the most that vLLM takes
        generator = torch.Generator().manual_seed((body["seed"] or 0) % 2**60)
        ids, logprobs, reason = [], [], "length"
        while len(ids) < body["max_tokens"] and reason == "length":
            logits = self.model(torch.tensor([body["prompt"] + ids])).logits[0, -1]
            for token, bias in body["logit_bias"].items():
                logits[int(token)] += bias
            hot = body["temperature"] or 1.0
            scaled = (logits / hot).log_softmax(-1)
            token = int(scaled.argmax())
            if body["temperature"]:
                token = int(scaled.exp().multinomial(1, generator=generator))
            ids.append(token)
            logprobs.append(float((logits.log_softmax(-1) if self.raw else scaled)[token]))
            text = self.tokenizer.decode(ids) if body["stop"] else ""
            if token in body["stop_token_ids"] or any(stop in text for stop in body["stop"]):
                reason = "stop"
        found = {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}}
        return {"choices": [found | {"index": 0, "finish_reason": reason}]}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that waits no longer has gone."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        server: Any = self.server
        with server.lock:
            server.requests.append((self.path, body))
            answer = server.fault(self.path, body) or server.answer(self.path, body)
        if answer == "die":
            return
        status, content = answer
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def fake_vllm(tokenizer: Any = None) -> Iterator[FakeVLLM]:
    """A server that answers inside the block."""
    with running(FakeVLLM(tokenizer)) as server:
        yield server
