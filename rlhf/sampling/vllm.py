"""The engine `vllm`: a vLLM server samples, with the weights that it is given.

    weights   before each call, the policy is written into a new folder as safetensors, adapters
              merged, and the server reads it (`reload_weights`). Both must see the folder.
    requests  one for each row, with a seed from its random numbers: an answer does not depend on
              the batch, up to rounding. The server batches them, and its own defaults are replaced.
    answers   token ids with their log-probs, at the temperature and without the forbidden ids.

The tokens are others than those of `loop`: vLLM draws in its own way. Left out: LoRA adapters by
themselves, and NCCL.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf.config import InputError, SamplingConfig, show
from rlhf.console import say
from rlhf.http_endpoint import ask
from rlhf.sampling.settings import Endings, Sampling
from rlhf.sampling.token_loop import Step
from rlhf.vllm_server import ENDPOINT, ServerProcess, check_server, model_and_version

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
    """

    def __init__(self, sampling: SamplingConfig):
        """Look for the server; raise an InputError if there is none and none can be started."""
        check_server(sampling)
        self.url, self._settings = sampling.url, sampling
        self._field = "sampling.url" if self.url else "sampling.vllm_python: server"
        self._folder = tempfile.TemporaryDirectory(prefix="rlhf-vllm-", dir=sampling.weights_dir)
        self._process: ServerProcess | None = None
        self._name, self._number = "", 0

    def begin(self, model: Any, tokenizer: Any) -> str:
        """Start the server where it is ours, and learn the name of its model; return what samples,
        in words."""
        if self.url is None:
            folder = Path(self._folder.name) / "0"
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            dtype, given = str(model.dtype).removeprefix("torch."), self._settings
            say(f"vllm: starting a server with {given.vllm_python} (a minute or more)")
            python, arguments = str(given.vllm_python), given.vllm_args
            self._process = ServerProcess(python, folder, dtype, arguments)
            seconds = self._process.wait()
            self.url = self._process.url
            say(f"vllm: {self.url} answers after {seconds:.0f} seconds")
        self._name, version = model_and_version(self.url, self._field)
        return f"vllm {version}, server {self.url}"

    def load(self, model: Any) -> None:
        """Give the server the weights of a plain causal LM."""
        self._number += 1
        folder = Path(self._folder.name) / str(self._number)
        model.save_pretrained(folder)
        order = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            self._ask("/collective_rpc", order)
        except InputError as error:
            if " answered " not in str(error):  # it does not run
                raise
            raise InputError(
                f"{error}; it takes weights if it was started with VLLM_SERVER_DEV_MODE=1 and can "
                f"read {folder} (sampling.weights_dir)"
            ) from error
        self._ask("/reset_prefix_cache", {})
        shutil.rmtree(folder.with_name(str(self._number - 1)), ignore_errors=True)

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

    def _ask(self, path: str, body: Any, num_retries: int = ENDPOINT.retries) -> Any:
        endpoint = replace(ENDPOINT, retries=num_retries)
        try:
            return ask(f"{self.url}{path}", body, endpoint, self._field)
        except InputError as error:
            ended = self._process.last_words() if self._process is not None else ""
            raise InputError(f"{error}; {ended}" if ended else str(error)) from error

    def _body(self, prompt: Sequence[int], seed: int | None, sampling: Sampling) -> dict[str, Any]:
        """The request for one response; the likeliest tokens without a seed."""
        stops = sampling.stop_strings.strings if sampling.stop_strings is not None else ()
        return {
            **PLAIN,
            **ASKED,
            "model": self._name,
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
