"""The way in: prompt ids in; response ids, log-probs and a `finished` flag out.

Sampling is inverse-CDF with one uniform number per token, from a generator keyed by (seed, update,
row): a response does not depend on its batch, on the number of processes, on earlier samples, or,
up to rounding, on the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.console import is_main_process
from rlhf.distributed import compute_device, is_sharded
from rlhf.models import copy_weights, eval_mode, plain_copy, sliced_copy, unwrap_peft
from rlhf.sampling.graph import GraphDecoder
from rlhf.sampling.in_step import in_step
from rlhf.sampling.settings import Generation, Sampling
from rlhf.sampling.token_loop import Step, loop
from rlhf.sampling.vllm import VLLM

CHECK_EVERY = 8  # steps of `graph` between two looks for finished rows


class Engine:
    """How a model samples.

    Attributes:
        name: "loop", "graph" or "vllm".
        copy: the model that samples in place of `model`, with its weights; None if `model` does.
        server: the vLLM server that samples, with the weights of the copy or the model.
    """

    def __init__(
        self,
        model: Any,
        name: str = "loop",
        check_every: int = CHECK_EVERY,
        dtype: torch.dtype | None = None,
        server: VLLM | None = None,
        in_slices: bool = False,
    ):
        """Prepare to sample.

        Args:
            dtype: of a copy of the model that samples in its place, adapters merged; None: no copy.
            in_slices: the copy, as the model is.

        Raises:
            ValueError: the model cannot sample with this engine.
        """
        self.name, self.model, self.server = name, model, server
        if server is not None:
            dtype = server.copy_type(model, dtype)
        self.copy = None
        if dtype is not None and in_slices:
            self.copy = sliced_copy(model, dtype)
        elif dtype is not None:  # the main process sends it to the server
            elsewhere = server is not None and not is_main_process()
            self.copy = plain_copy(model, dtype, "meta" if elsewhere else None)
        reader = self.copy or model
        self._steps: Callable[..., Iterator[Step]] = partial(loop, reader)
        if name == "graph":
            self._steps = GraphDecoder(reader, check_every)

    @property
    def reads_slices(self) -> bool:
        """True if what samples is in slices: all processes sample together."""
        return self.server is None and is_sharded(self.copy or self.model)

    @contextmanager
    def ready(self) -> Iterator[Callable[..., Iterator[Step]]]:
        """Give the function that samples one batch, with the weights as they are now; of slices,
        and by a server, as `refresh` found them."""
        if self.server is not None:
            yield self.server
            return
        if self.copy is not None and not is_sharded(self.model):
            copy_weights(self.model, self.copy)
        if self.copy is None:
            with eval_mode(self.model), in_step(self.model):
                yield self._steps
            return
        kind = compute_device(self.copy).type
        with torch.autocast(kind, enabled=False), in_step(self.copy):  # it has its type already
            yield self._steps

    def refresh(self) -> None:
        """Bring the copy of a sharded model, and the server, up to date; all processes do it
        together."""
        is_read = is_sharded(self.model) or (self.server is not None and is_main_process())
        if self.copy is not None and is_read:
            copy_weights(self.model, self.copy)
        if self.server is not None:
            self.server.load(self.model, self.copy or self.model)

    def use(self) -> Engine:
        """Let `generate` and `stream` sample with this engine from now on."""
        unwrap_peft(self.model)._rlhf_engine = self
        return self


def use_engine(model: Any, *arguments: Any, **options: Any) -> Engine:
    """Let `generate` and `stream` sample from a model as an `Engine` of these arguments does."""
    unwrap_peft(model).__dict__.pop("_rlhf_engine", None)  # the memory of the last one, first
    return Engine(model, *arguments, **options).use()


def engine_of(model: Any) -> Engine:
    """The engine of a model: what `use_engine` has set, else `loop`."""
    return getattr(unwrap_peft(model), "_rlhf_engine", None) or Engine(model)


@torch.no_grad()
def generate(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    noise: Tensor | None,
    batch_size: int = 64,
    ended: Callable[[int, list[int]], None] = lambda row, ids: None,
) -> Generation:
    """Sample one response per prompt, with the model's engine.

    Args:
        model: a causal LM (PEFT allowed, no distributed wrapper).
        prompt_ids: token ids per prompt, not padded, not empty; equal ones are read once.
        noise: (B, max_new_tokens) from `uniform_noise`; None takes the most likely token.
        batch_size: sequences decoded together; a server gets all of them and decides.
        ended: called with the number and the ids of each response as soon as it is complete.
    """
    count = len(prompt_ids)
    result = Generation([[] for _ in prompt_ids], [[] for _ in prompt_ids], [False] * count)
    order = sorted(range(count), key=lambda i: len(prompt_ids[i]))  # similar lengths: less padding
    engine = engine_of(model)
    batch_size = batch_size if engine.server is None else max(count, 1)
    with engine.ready() as steps:
        for start in range(0, count, batch_size):
            rows = order[start : start + batch_size]
            draws = None if noise is None else noise[rows]
            for step in steps([prompt_ids[i] for i in rows], sampling, draws):
                for active, token, logprob, done in zip(*step, strict=True):
                    result.ids[rows[active]].append(token)
                    result.logprobs[rows[active]].append(logprob)
                    result.finished[rows[active]] = done
                    if done:
                        ended(rows[active], result.ids[rows[active]])
            for row in rows:
                if not result.finished[row]:
                    ended(row, result.ids[row])
    return result


@torch.no_grad()
def stream(
    model: Any, prompt_ids: Sequence[int], sampling: Sampling, noise: Tensor | None
) -> Iterator[int]:
    """As `generate` for one prompt, but yield each token as soon as it is chosen."""
    with engine_of(model).ready() as steps:
        for step in steps([prompt_ids], sampling, noise):
            yield step.tokens[0]
