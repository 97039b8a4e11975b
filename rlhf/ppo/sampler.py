"""What samples from the policy in a PPO run, by the settings under `sampling`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch

from rlhf.config import InputError, PPOStageConfig
from rlhf.console import say
from rlhf.distributed import compute_device, is_sharded, local
from rlhf.engine_choice import choose_engine, choose_server
from rlhf.models import copy_bytes, unwrap_peft
from rlhf.ppo.preflight.examine import free_here
from rlhf.ppo.preflight.longest_step import chooses_tokens, longest_micro_batch
from rlhf.ppo.preflight.memory import FULL, estimate_memory, size_text
from rlhf.ppo.trainer import PPOTrainer
from rlhf.sampling import VLLM, engine_of, use_engine
from rlhf.scorers import Scorer
from rlhf.slices import sliced_bytes


@contextmanager
def sampling_server(config: PPOStageConfig) -> Iterator[VLLM | None]:
    """The vLLM server of the settings, if there is one; one that the run started ends with the
    block."""
    if config.sampling.engine != "vllm":
        yield None
        return
    with closing(VLLM(config.sampling)) as server:
        yield server


def choose_sampler(trainer: PPOTrainer, independent: Scorer | None, server: VLLM | None) -> None:
    """Choose how the policy samples, and set `actors.sampling` to that in words. Of a policy in
    slices, `sampling.gather` becomes what is chosen.

    Args:
        independent: the scorer of `evaluation.scorer`.
    """
    config, actors = trainer.config, trainer.actors
    given, policy, tokenizer = config.sampling, actors.policy, actors.tokenizer
    with trainer.accelerator.autocast():
        dtype = _copy_type(config, policy)
    if is_sharded(policy) and server is None and given.gather != "layers":
        given.gather = _gather(trainer, independent, dtype or unwrap_peft(policy).dtype)
    in_slices = is_sharded(policy) and given.gather == "layers"
    with trainer.accelerator.autocast():
        if server is not None:
            actors.sampling = choose_server(policy, tokenizer, server, dtype)
        elif in_slices and dtype == unwrap_peft(policy).dtype == _computed_type(policy):
            use_engine(policy)  # `require_cache` has measured it
            actors.sampling = "loop"
        else:
            choice = given.engine, "sampling.engine", given.check_every, dtype
            actors.sampling = choose_engine(policy, tokenizer, *choice, in_slices=in_slices)
    if is_sharded(policy):
        actors.sampling += _cost(config, policy)


def _copy_type(config: PPOStageConfig, policy: Any) -> torch.dtype | None:
    """Type of the copy that samples, by `sampling.dtype`; None where the policy itself samples."""
    inner, given, shards = unwrap_peft(policy), config.sampling.dtype, is_sharded(policy)
    if given is None:
        kind = compute_device(inner).type
        serves = kind == "cuda" and torch.is_autocast_enabled(kind) and inner.dtype == torch.float32
        return torch.bfloat16 if serves else inner.dtype if shards else None
    dtype = getattr(torch, given)
    return None if inner is policy and inner.dtype == dtype and not shards else dtype


def _computed_type(policy: Any) -> torch.dtype:
    """Type in which the layers of a policy compute."""
    kind = compute_device(policy).type
    autocasts = torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocasts else unwrap_peft(policy).dtype


def _gather(trainer: PPOTrainer, independent: Scorer | None, dtype: torch.dtype) -> str:
    """Choose `sampling.gather` on all processes alike: copy, if one fits next to all else on each
    of them, or if the settings need it; else layers.

    Raises:
        InputError: the settings need a copy, and there is no room for it.
    """
    config, accelerator = trainer.config, trainer.accelerator
    graph = config.sampling.engine == "graph"
    needs_copy = graph or config.sampling.gather == "copy"
    if needs_copy and not config.preflight:
        return "copy"
    size = copy_bytes(trainer.actors.policy, dtype)
    replays = config.sampling.engine == "auto" and accelerator.device.type == "cuda"
    planned = "graph" if graph or replays else "loop", dtype
    part = longest_micro_batch(trainer)
    if chooses_tokens(trainer):  # the preflight takes fewer rows where there is no room
        part = part.select(torch.arange(1, device=accelerator.device))
    estimate = estimate_memory(trainer, part, independent, planned)
    room = free_here(accelerator.device)[1]
    room += estimate.sum("weights") - estimate.models["sampler"].weights  # that is not there
    mine = torch.tensor([[estimate.total / room, room]], dtype=torch.float64)
    shares, rooms = accelerator.gather(mine.to(accelerator.device)).unbind(dim=1)
    fullest = int(shares.argmax())
    share, room = float(shares[fullest]), int(rooms[fullest])
    if share <= (1 if needs_copy else FULL):
        return "copy"
    need = (
        f"with a copy of the policy of {size_text(size)}, the run would take {share:.0%} of the "
        f"{size_text(room)} of a process"
    )
    if needs_copy:
        given, loop = ("engine=graph", "sampling.engine=loop ") if graph else ("gather=copy", "")
        raise InputError(
            f"sampling.{given}: {need}; set {loop}sampling.gather=layers, which samples from the "
            "slices (preflight=false tries nevertheless)"
        )
    say(f"sampling.gather=layers: {need}")
    return "layers"


def _cost(config: PPOStageConfig, policy: Any) -> str:
    """What sampling from a policy in slices takes, in words."""
    engine, rows = engine_of(policy), config.ppo.rollout_batch_size
    kept = 0 if engine.copy is None else sum(local(p).nbytes for p in engine.copy.parameters())
    if engine.reads_slices:
        gathered = size_text(sliced_bytes(engine.copy or policy))
        keeps = f"{size_text(kept)} of the copy" if kept else "no copy of the policy"
        return (
            f", layer by layer: each process gathers {gathered} for each token of up to {rows} "
            f"responses, and keeps {keeps}"
        )
    where = "each process" if engine.server is None else "the first process"
    return f": {size_text(kept)} on {where}, gathered once before a rollout" if kept else ""
