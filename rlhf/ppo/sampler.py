"""What samples from the policy in a PPO run, by the settings under `sampling`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from rlhf.config import PPOStageConfig
from rlhf.distributed import compute_device
from rlhf.engine_choice import choose_engine, choose_server
from rlhf.models import unwrap_peft
from rlhf.ppo.actors import Actors
from rlhf.sampling import VLLM


@contextmanager
def sampling_server(config: PPOStageConfig) -> Iterator[VLLM | None]:
    """The vLLM server of the settings, if there is one; one that the run started ends with the
    block."""
    if config.sampling.engine != "vllm":
        yield None
        return
    with closing(VLLM(config.sampling)) as server:
        yield server


def choose_sampler(
    config: PPOStageConfig, actors: Actors, accelerator: Accelerator, server: VLLM | None
) -> None:
    """Choose how the policy samples, and set `actors.sampling` to that in words."""
    given, policy, tokenizer = config.sampling, actors.policy, actors.tokenizer
    with accelerator.autocast(), actors.in_use(policy):
        dtype = _copy_type(config, policy, accelerator.is_fsdp2)
        if server is not None:
            actors.sampling = choose_server(policy, tokenizer, server, dtype)
        else:
            choice = given.engine, "sampling.engine", given.check_every, dtype
            actors.sampling = choose_engine(policy, tokenizer, *choice)


def _copy_type(config: PPOStageConfig, policy: Any, shards: bool) -> torch.dtype | None:
    """Type of the copy that samples, by `sampling.dtype`; None where the policy itself samples.
    With slices of it alone, it cannot."""
    inner, given = unwrap_peft(policy), config.sampling.dtype
    if given is None:
        kind = compute_device(inner).type
        serves = kind == "cuda" and torch.is_autocast_enabled(kind) and inner.dtype == torch.float32
        return torch.bfloat16 if serves else inner.dtype if shards else None
    dtype = getattr(torch, given)
    return None if inner is policy and inner.dtype == dtype and not shards else dtype
