"""A server that answers as vLLM does, in this process: it reads weights and LoRA adapters from
folders and samples with them. The fields of requests and answers are those of vLLM 0.32;
`test-vllm` runs the real one.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from helpers.endpoints import running
from peft import PeftModel
from transformers import AutoModelForCausalLM

MODELS = {"object": "list", "data": [{"id": "policy", "max_model_len": 128}]}


class FakeVLLM(ThreadingHTTPServer):
    """Attributes:
    model: what samples; set by `reload_weights`.
    adapters: name of each LoRA adapter that is loaded -> what samples with it.
    max_lora_rank: None: it was started without `--enable-lora`.
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
        self.adapters, self.max_lora_rank = {}, 16
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
        if path == "/v1/load_lora_adapter":
            return self.load_adapter(body["lora_name"], Path(body["lora_path"]))
        if path == "/v1/unload_lora_adapter" and self.adapters.pop(body["lora_name"], None):
            return 200, b"Success: LoRA adapter removed successfully."
        if path == "/v1/completions":
            return 200, self.complete(body)
        return 404, {"detail": "Not Found"}

    def load_adapter(self, name: str, folder: Path) -> tuple[int, Any]:
        if self.max_lora_rank is None:
            return 500, {"error": {"message": "LoRA is not enabled."}}
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            said = f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."
            return 500, {"error": {"message": said}}
        if name in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded"}}
        base = copy.deepcopy(self.model)
        self.adapters[name] = PeftModel.from_pretrained(base, folder).eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully.".encode()

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        model = self.model if body["model"] == "policy" else self.adapters[body["model"]]
        assert body["ignore_eos"] and body["return_token_ids"]
        assert body["temperature"] <= 2.0  # the most that vLLM takes
        generator = torch.Generator().manual_seed((body["seed"] or 0) % 2**60)
        ids, logprobs, reason = [], [], "length"
        while len(ids) < body["max_tokens"] and reason == "length":
            logits = model(torch.tensor([body["prompt"] + ids])).logits[0, -1]
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
