"""The engine `vllm`: a vLLM server samples, with the weights that it is given.

    weights   before each rollout, `load` gives it the policy's, by a folder that both see or from
              GPU to GPU (`vllm_weights.py`). The main process does that; all of them ask.
    requests  one for each row, with a seed from its random numbers: an answer does not depend on
              the batch, up to rounding. The server batches them, and its own defaults are replaced.
    answers   token ids with their log-probs, at the temperature and without the forbidden ids.

The tokens are others than those of `loop`: vLLM draws in its own way.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config import InputError, SamplingConfig, show
from rlhf.console import say
from rlhf.failures import on_main_process
from rlhf.http_endpoint import ask
from rlhf.hub import ADAPTER, read_json
from rlhf.models import adapter_writer, unwrap_peft
from rlhf.sampling.settings import Endings, Sampling
from rlhf.sampling.token_loop import Step
from rlhf.sampling.vllm_weights import (
    NCCL,
    megabytes,
    require_cuda,
    server_arguments,
    why_no_adapter,
    write_base,
)
from rlhf.vllm_server import ENDPOINT, LONGEST_END, ServerProcess, check_server, model_and_version

MOST_REQUESTS = 128  # under way at once; the server decides how many it decodes together
NEVER = -100.0  # logit of a forbidden token, the least that vLLM accepts
# what the generation config of the server's model may set otherwise
PLAIN = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
PLAIN |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "min_tokens": 0}
# ids and log-probs of the tokens; stop tokens come from us alone, and stop strings see all text
ASKED = {"logprobs": 0, "return_token_ids": True, "ignore_eos": True}
ASKED |= {"include_stop_str_in_output": True, "skip_special_tokens": False}


class VLLM:
    """A vLLM server that samples: one that the user has started, or one of our own.

    Attributes:
        url: where it answers; None until our own is started.
        way: how the weights go over: "files", "adapter" or "nccl".
        sent: the last weights in words: what, how large, in how many seconds.
    """

    def __init__(self, sampling: SamplingConfig):
        """Look for the server; raise an InputError if there is none and none can be started."""
        check_server(sampling)
        require_cuda(sampling.weights)
        self.url, self._settings = sampling.url, sampling
        self.way, self._reason, self.sent = "files", "", ""
        self._field = "sampling.url" if self.url else "sampling.vllm_python: server"
        self._folder = tempfile.TemporaryDirectory(prefix="rlhf-vllm-", dir=sampling.weights_dir)
        self._process: ServerProcess | None = None
        self._nccl: NCCL | None = None
        self._base, self._asked, self._number = "", "", 0  # names of its model, and of ours there

    def begin(self, model: Any, tokenizer: Any, dtype: torch.dtype) -> str:
        """Choose how weights of this type go over, start the server where it is ours, and give it
        what stays; return what samples, in words. All processes do it together."""
        wanted, reason = self._settings.weights, why_no_adapter(model)
        if wanted == "adapter" and reason:
            raise InputError(f"sampling.weights=adapter: {reason}; set sampling.weights=files")
        self.way = wanted if wanted != "auto" else "files" if reason else "adapter"
        self._reason = f", because {reason}" if reason and wanted == "auto" else ""
        base, write = Path(self._folder.name) / "0", None
        if self._settings.url is None or self.way == "adapter":
            write_base(model, dtype, base)
        if self.way == "adapter":
            write = adapter_writer(model, str(base))

        def connect() -> tuple[str, str | None, str]:
            said = self._connect_or_else(base, tokenizer, model, write)
            return said, self.url, self.way

        said, self.url, self.way = on_main_process(connect)
        return said

    def copy_type(self, model: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Type of the plain copy of a model that goes over, where it is to be `dtype` if given;
        None if there is no need of a copy."""
        if self.way == "adapter":
            return None
        inner = unwrap_peft(model)
        return inner.dtype if dtype is None and inner is not model else dtype

    def load(self, model: Any, plain: Any) -> None:
        """Give the server the weights of a causal LM as they are now, `plain` without adapters; all
        processes do it together."""
        write = plain.save_pretrained
        if self.way == "adapter":
            write = adapter_writer(model, str(Path(self._folder.name) / "0"))
        self._asked, self.sent = on_main_process(lambda: self._send(plain, write))

    def _connect_or_else(self, base: Path, tokenizer: Any, model: Any, write: Any) -> str:
        """Connect, for files where `auto` took an adapter and the server does not."""
        try:
            return self._connect(base, tokenizer, model, write)
        except InputError as error:
            if write is None or self._settings.weights != "auto":
                raise
            self.way, self._reason = "files", ", because the server took no adapter"
            say(f"vllm: sampling.weights=auto takes files, not an adapter: {error}")
            return self._connect(base, tokenizer, model, write)

    def _connect(self, base: Path, tokenizer: Any, model: Any, write: Any) -> str:
        """Start the server where it is ours, and try how the weights will go over."""
        if self._settings.url is None:
            tokenizer.save_pretrained(base)
            self._start(base, server_arguments(model, self.way))
        self._base, version = model_and_version(str(self.url), self._field)
        self._asked = self._base
        if self.way == "adapter":
            if self._settings.url is not None:
                self._reload(base)
            self._send(None, write)
        if self.way == "nccl":
            self._nccl = NCCL(f"{self._field}={self.url}", str(self.url))
        return f"vllm {version}, server {self.url}"

    def _start(self, folder: Path, arguments: list[str]) -> None:
        if self._process is not None:
            self._process.stop()
        given = self._settings
        say(f"vllm: starting a server with {given.vllm_python} (a minute or more)")
        dtype = read_json(folder / "config.json")["dtype"]
        arguments = [*arguments, *given.vllm_args]
        self._process = ServerProcess(str(given.vllm_python), folder, dtype, arguments)
        seconds = self._process.wait()
        self.url = self._process.url
        say(f"vllm: {self.url} answers after {seconds:.0f} seconds")

    def _send(self, plain: Any, write: Callable[..., Any]) -> tuple[str, str]:
        """Send the weights; return the name to ask for from now on, and what went over in words."""
        began, self._number = time.monotonic(), self._number + 1
        folder = Path(self._folder.name) / str(self._number)
        name, size = self._base, 0.0
        if self._nccl is not None:
            size = self._nccl.send(plain)
        else:
            write(folder)
            size = megabytes(folder)
            if self.way == "adapter":
                name = f"{folder.parent.name}-{self._number}"
                self._load_adapter(folder, name)
            else:
                self._reload(folder)
        self._ask("/reset_prefix_cache", {})
        shutil.rmtree(folder.with_name(str(self._number - 1)), ignore_errors=True)
        took = f"{size:,.2f} MB in {time.monotonic() - began:.2f} s"
        return name, f"weights as {self.way}{self._reason}: {took}"

    def _reload(self, folder: Path) -> None:
        order = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        takes = f"VLLM_SERVER_DEV_MODE=1 and can read {folder} (sampling.weights_dir)"
        self._order("/collective_rpc", order, f"it takes weights if it was started with {takes}")

    def _load_adapter(self, folder: Path, name: str) -> None:
        """Load an adapter under a new name, which older entries of the prefix cache do not have,
        and take away the one before."""
        order = {"lora_name": name, "lora_path": str(folder)}
        rank = read_json(folder / ADAPTER)["r"]
        hint = (
            "it takes adapters if it was started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, "
            f"--enable-lora and --max-lora-rank {rank}, and can read {folder} "
            "(sampling.weights_dir); or set sampling.weights=files"
        )
        self._order("/v1/load_lora_adapter", order, hint, is_json=False)
        if self._asked != self._base:
            hint = "it has been started again, without the base that it got; resume=true sends that"
            last = {"lora_name": self._asked}
            self._order("/v1/unload_lora_adapter", last, hint, is_json=False)
        self._asked = name

    def __call__(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, noise: Tensor | None
    ) -> Iterator[Step]:
        """As `loop`, but complete responses arrive before the first step."""
        seeds = [None] * len(prompts) if noise is None else (noise[:, 0] * 2**53).long().tolist()
        bodies = [self._body(*row, sampling) for row in zip(prompts, seeds, strict=True)]
        answers = self._answers(bodies)
        ends, active = Endings(sampling, len(prompts)), list(range(len(prompts)))
        for t in range(sampling.max_new_tokens):
            active = [row for row in active if t < len(answers[row][0])]
            if not active:
                break
            tokens = [answers[row][0][t] for row in active]
            done = ends(active, tokens)
            yield Step(active, tokens, [answers[row][1][t] for row in active], done)
            active = [row for row, end in zip(active, done, strict=True) if not end]

    def close(self) -> None:
        """Stop the server, if it is ours, and delete the weights."""
        if self._process is not None:
            self._process.stop()
        self._folder.cleanup()

    def _order(self, path: str, body: Any, hint: str, is_json: bool = True) -> None:
        """Ask for something that only some servers do."""
        try:
            self._ask(path, body, is_json=is_json)
        except InputError as error:
            if " answered " not in str(error):  # it does not run
                raise
            raise InputError(f"{error}; {hint}") from error

    def _ask(
        self, path: str, body: Any, num_retries: int = ENDPOINT.retries, is_json: bool = True
    ) -> Any:
        endpoint = replace(ENDPOINT, retries=num_retries)
        try:
            return ask(f"{self.url}{path}", body, endpoint, self._field, is_json=is_json)
        except InputError as error:
            own, is_last = self._process, num_retries > 0 and "cannot be reached" in str(error)
            ended = own.last_words(LONGEST_END if is_last else 0.0) if own is not None else ""
            raise InputError(f"{error}; {ended}" if ended else str(error)) from error

    def _body(self, prompt: Sequence[int], seed: int | None, sampling: Sampling) -> dict[str, Any]:
        """The request for one response; the likeliest tokens without a seed."""
        stops = sampling.stop_strings.strings if sampling.stop_strings is not None else ()
        return {
            **PLAIN,
            **ASKED,
            "model": self._asked,
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": 0.0 if seed is None else sampling.temperature,
            "seed": seed,
            "stop_token_ids": [i for i in sampling.stop_ids if i >= 0],
            "stop": [text for text in stops if text],
            "logit_bias": {str(i): NEVER for i in sampling.forbidden.tolist()},
        }

    def _answers(self, bodies: list[dict[str, Any]]) -> list[tuple[list[int], list[float]]]:
        """Tokens and log-probs for each request. What fails is asked again, one after the other:
        of a server that has died, one request learns it, not all."""

        def try_once(body: dict[str, Any]) -> Any:
            try:
                return self._ask("/v1/completions", body, num_retries=0)
            except InputError:
                return None

        with ThreadPoolExecutor(min(len(bodies), MOST_REQUESTS)) as pool:
            answers = list(pool.map(try_once, bodies))
        found = []
        for body, answer in zip(bodies, answers, strict=True):
            answer = self._ask("/v1/completions", body) if answer is None else answer
            found.append(self._read(answer, body))
        return found

    def _read(self, answer: Any, body: dict[str, Any]) -> tuple[list[int], list[float]]:
        """Token ids and log-probs of an answer."""
        try:
            choice = answer["choices"][0]
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            fits = 0 < len(ids) == len(logprobs) <= body["max_tokens"]
            right = all(type(i) is int for i in ids) and all(map(math.isfinite, logprobs))
        except (LookupError, TypeError):
            fits = right = False
        if not (fits and right):
            raise InputError(
                f"{self._field}={self.url}/v1/completions answered {show(answer)}, not token_ids "
                "with as many finite token_logprobs; is it vLLM, of version 0.11 or later?"
            )
        return ids, [float(x) for x in logprobs]
