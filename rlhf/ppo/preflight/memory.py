"""Memory of a PPO run: an estimate, and how it is judged.

In the estimate, weights, gradients and Adam states are counted, so they are exact. Activations are
measured: what autograd keeps of one and of two rows, extended to a micro-batch; and what a pass
without gradients holds at most, for prompts and for a reward model. Left out, so that the estimate
is a little low: temporaries of a training step, what gradient checkpointing recomputes, a Python
scorer's own memory, and what the libraries take. The step that `longest_step.py` measures has all
of that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from rlhf.checkpoint.saving import in_background
from rlhf.config import PPOStageConfig, has_frozen_models
from rlhf.console import table
from rlhf.distributed import loads_in_slices, local, sharding
from rlhf.functional.tokens import BLOCK
from rlhf.models import (
    ModelMemory,
    ScalarModel,
    accepts,
    cache_bytes,
    cache_numbers,
    chunk_tokens,
    copy_bytes,
    ends_with_head,
    eval_mode,
    kept_bytes,
    model_memory,
    passing_bytes,
    prefill_inputs,
    sequence_scores,
    unwrap_peft,
)
from rlhf.ppo.critic import could_share_base
from rlhf.ppo.passes import critic_values, policy_logprobs
from rlhf.ppo.preflight.findings import FAIL, OK, WARN, Finding
from rlhf.ppo.rollout import Responses
from rlhf.ppo.trainer import PPOTrainer
from rlhf.sampling import engine_of, room_of, roomy_cache
from rlhf.scorers import Scorer, reward_models
from rlhf.zero import shape_of

FULL = 0.85  # share of the memory beyond which a run is at risk
# while sampling, for each number of the vocabulary: logits and log-probs in float32, three float64
SAMPLER_BYTES = 2 * 4 + 3 * 8


@dataclass
class MemoryEstimate:
    """Bytes that a run needs on this process."""

    models: dict[str, ModelMemory]  # those of policy, reference, critic, and all reward models
    sampling: int  # of one batch: the pass over the prompts, or cache and logits at full length
    scoring: int = 0  # what a reward model's pass holds
    visiting: int = 0  # the largest of the models that `offload_frozen` keeps on the CPU

    def sum(self, *names: str) -> int:
        """Sum some columns over the models."""
        return sum(getattr(model, name) for model in self.models.values() for name in names)

    def largest(self) -> dict[str, int]:
        """Parts of the moment that needs most: an optimiser step, or the rollout."""
        step = {
            "weights": self.sum("weights"),
            "gradients and Adam states": self.sum("gradients", "adam"),
            # policy and critic step one after the other
            "activations": max(model.activations for model in self.models.values()),
        }
        rollout = {
            "weights": self.sum("weights"),
            "gradients and Adam states": self.sum("adam"),  # gradients are dropped after each step
            "the rollout's cache": self.sampling,
        }
        reading = rollout | {"weights": self.sum("weights") + self.visiting}
        reading["the rollout's cache"], reading["the scorer's pass"] = 0, self.scoring
        return max(step, rollout, reading, key=lambda parts: sum(parts.values()))

    def moment(self) -> str:
        """What that moment is in: "training", "sampling" or "scoring"."""
        parts = self.largest()
        if "activations" in parts:
            return "training"
        return "scoring" if "the scorer's pass" in parts else "sampling"

    @property
    def total(self) -> int:
        """Bytes of that moment."""
        return sum(self.largest().values())


# --- Judging the estimate -------------------------------------------------------------------------


def examine_memory(estimate: MemoryEstimate, room: int, config: PPOStageConfig) -> Finding:
    """Compare the estimate with what the device has.

    Args:
        room: bytes that this process can have in all, including the models it has loaded.
    """
    share = estimate.total / room
    unit, divisor = _unit(estimate.total)
    columns = ("weights", "gradients", "adam", "activations")
    rows = [
        (name, *(round(getattr(model, column) / divisor, 1) for column in columns))
        for name, model in estimate.models.items()
    ]
    details = table(rows, (unit, "weights", "gradients", "Adam", "activations"))
    text = (
        f"about {size_text(estimate.total)} of {size_text(room)} ({share:.0%}); sampling alone "
        f"may take {size_text(estimate.sampling)}"
    )
    status, fix = judge(share, estimate, config)
    return Finding("memory", status, text, fix, details)


def examine_main_memory(copied: int, free: int) -> Finding:
    """Judge the copy from which a thread writes a checkpoint while a GPU trains.

    Args:
        free: bytes of main memory that this process can still get.
    """
    text = f"the copy for a background checkpoint takes {size_text(copied)} of {size_text(free)}"
    status = FAIL if copied > free else WARN if copied > FULL * free else OK
    override = "" if status == OK else "checkpoint.background=false"
    fix = override and f"set {override}: training then waits until a checkpoint is written"
    return Finding("main memory", status, text, fix, override=override)


def judge(share: float, estimate: MemoryEstimate, config: PPOStageConfig) -> tuple[str, str]:
    """Turn a share of the memory into the status and the remedy of a finding."""
    status = FAIL if share > 1 else WARN if share > FULL else OK
    return status, "" if status == OK else remedy(estimate, config)


def _unit(num_bytes: float) -> tuple[str, int]:
    return ("GiB", 2**30) if num_bytes >= 2**30 else ("MiB", 2**20)


def size_text(num_bytes: float) -> str:
    """Write bytes as MiB or GiB."""
    unit, divisor = _unit(num_bytes)
    return f"{num_bytes / divisor:.1f} {unit}"


def remedy(estimate: MemoryEstimate, config: PPOStageConfig) -> str:
    """Name the settings that shrink the largest part that a setting can shrink."""
    ppo, model, lora = config.ppo, config.model, config.peft.enabled
    limit = "micro_batch_tokens" if isinstance(ppo.micro_batch_tokens, int) else "micro_batch_size"
    now = {limit: getattr(ppo, limit) or ppo.rows_of(1), "size": ppo.rollout_batch_size}
    now["scored"] = config.scorer.batch_size
    half = {name: number // 2 for name, number in now.items()}
    least = ppo.response_length if limit == "micro_batch_tokens" else 0  # a row is longer
    settings = {
        "weights": {
            "peft=lora": not lora,  # the reference is then the policy with its adapters off
            "ppo.share_base=true": could_share_base(config),
            "checkpoint.background=false": bool(config.checkpoint.background)
            and not torch.cuda.is_available(),  # the copy of a GPU's weights is in main memory
            # the adapters stay in float32
            "model.dtype=bfloat16": lora
            and model.dtype in ("auto", "float32")
            and sharding() != "DeepSpeed",
            "model.quantization=4bit": lora and model.quantization is None and not sharding(),
            "offload_frozen=true": torch.cuda.is_available()
            and has_frozen_models(config)
            and not (config.offload_frozen or ppo.share_base),
            "sampling.gather=layers": loads_in_slices()
            and config.sampling.gather == "copy"
            and config.sampling.engine in ("auto", "loop"),
        },
        "gradients and Adam states": {"peft=lora": not lora},
        "activations": {
            f"ppo.{limit}={half[limit]}": half[limit] > least,
            "model.gradient_checkpointing=true": not model.gradient_checkpointing,
        },
        "the rollout's cache": {f"ppo.rollout_batch_size={half['size']}": half["size"] > 0},
        "the scorer's pass": {f"scorer.batch_size={half['scored']}": half["scored"] > 0},
    }
    parts = estimate.largest()
    for name in sorted(parts, key=lambda name: -parts[name]):
        helpful = [setting for setting, helps in settings[name].items() if helps]
        if helpful:
            return (
                f"most of the memory that settings can save is {name}: set {' or '.join(helpful)}"
            )
    return "take a smaller model, or lower ppo.max_prompt_length or ppo.response_length"


# --- Estimating -----------------------------------------------------------------------------------


def estimate_memory(
    trainer: PPOTrainer,
    part: Responses,
    independent: Scorer | None = None,
    planned: tuple[str, torch.dtype] | None = None,
) -> MemoryEstimate:
    """Estimate what a run needs on this process.

    Args:
        part: see `longest_micro_batch`.
        independent: the scorer of `evaluation.scorer`.
        planned: engine that will sample, and type of its copy of the policy (None: as now).
    """
    actors, sampling, ppo = trainer.actors, trainer.sampling, trainer.config.ppo
    distributed = trainer.accelerator.num_processes > 1

    def read_policy(rows: Responses) -> None:
        policy_logprobs(actors.policy, rows, sampling)

    def read_critic(rows: Responses) -> None:
        critic_values(actors.critic, rows)

    policy = model_memory(actors.policy, distributed)
    policy.weights += sum(local(t).nbytes for t in (trainer.updater.averages or {}).values())
    with chunk_tokens(actors.policy, sys.maxsize):  # the logits of all tokens are kept
        policy.activations = activation_bytes(read_policy, actors.policy, part)
    policy.activations += further_logits(trainer, part)
    models = {"policy": policy}
    if actors.reference is not None:
        models["reference"] = model_memory(actors.reference)
    if actors.critic is not None:
        models["critic"] = model_memory(actors.critic, distributed, actors.policy)
        if not actors.shares_trunk:
            models["critic"].activations = activation_bytes(read_critic, actors.critic, part)
    scorers = [actors.scorer] if independent is None else [actors.scorer, independent]
    readers = [m.model for scorer in scorers for m in reward_models(scorer)]
    weights = [model_memory(model, besides=actors.policy).weights for model in readers]
    if weights:
        models["reward models"] = ModelMemory(sum(weights))
    frozen = [name for name in ("reference", "reward models") if name in models]
    away = [models.pop(name).weights for name in frozen if actors.reading_device]
    num_rows = min(ppo.rollout_batch_size, ppo.batch_size // trainer.accelerator.num_processes)
    rollout = _sampling(trainer, part, models, num_rows, planned)
    scored = [] if actors.reading_device else readers
    autocast = trainer.accelerator.autocast
    scoring = max((scoring_bytes(model, part, autocast) for model in scored), default=0)
    scoring *= min(num_rows, trainer.config.scorer.batch_size)
    if trainer.accelerator.device.type == "cpu" and copies_checkpoint(trainer):
        models["checkpoint"] = ModelMemory(checkpoint_bytes(trainer))
    return MemoryEstimate(models, rollout, scoring, max(away, default=0))


def copies_checkpoint(trainer: PPOTrainer) -> bool:
    """True if a thread writes checkpoints, from a copy in main memory."""
    on_gpu = trainer.accelerator.device.type == "cuda"
    return in_background(trainer.config, trainer.updater.optimizers, on_gpu)


def checkpoint_bytes(trainer: PPOTrainer) -> int:
    """Bytes of what this process, or the first one where weights are whole, writes of a checkpoint:
    weights that train, Adam's two moments of each, and averaged weights."""
    averages = (trainer.updater.averages or {}).values()
    copied = [
        local(t).nbytes for named in trainer.updater.trainable.values() for t in named.values()
    ]
    return 3 * sum(copied) + sum(local(t).nbytes for t in averages)


def _sampling(
    trainer: PPOTrainer,
    part: Responses,
    models: dict[str, ModelMemory],
    num_rows: int,
    planned: tuple[str, torch.dtype] | None,
) -> int:
    """Bytes that sampling takes for a while; what the sampler keeps is added to `models`."""
    policy = trainer.actors.policy
    engine = engine_of(policy)
    name, kind = planned or (engine.name, None if engine.copy is None else engine.copy.dtype)
    is_here = engine.copy is not None and engine.copy.device.type != "meta"
    copied = model_memory(engine.copy).weights if is_here else 0
    copied = copied if planned is None else copy_bytes(policy, planned[1])
    if kind is None and name == "graph" and trainer.accelerator.mixed_precision != "no":
        kind = torch.bfloat16  # it keeps them as attention reads them
    num_logits = shape_of(policy.get_output_embeddings().weight)[0]
    passing = num_rows * num_logits * SAMPLER_BYTES
    per_token = num_rows * cache_bytes_per_token(policy, part, kind)
    length = part.sequence_ids.shape[1]
    if name == "graph":
        cache = per_token * length
        models["sampler"] = ModelMemory(cache)  # its cache stays where it is
    elif engine.server is None:  # the last token is not read
        passing += per_token * room_of(part.prompt_ids.shape[1], part.response_ids.shape[1] - 1)
    if copied:
        models.setdefault("sampler", ModelMemory(0)).weights += copied
    if engine.server is not None:
        return passing
    num_prompts = -(-num_rows // trainer.config.ppo.samples_per_prompt)  # equal ones are read once
    new_cache = roomy_cache if name == "loop" else lambda config: DynamicCache(config=config)
    return max(passing, num_prompts * prefill_bytes(engine.copy or policy, part, new_cache))


def further_logits(trainer: PPOTrainer, part: Responses) -> int:
    """Bytes of a chunk of logits and of its gradient, with two blocks of it in float32, and of the
    head's gradient by one of several chunks, less the logits of all tokens."""
    policy, ppo = trainer.actors.policy, trainer.config.ppo
    num_tokens, weight = int(part.lengths.sum()), policy.get_output_embeddings().weight
    own, shape = weight.element_size(), shape_of(weight)
    size = own if trainer.accelerator.mixed_precision == "no" else 2
    chunk = min(num_tokens, ppo.chunk_tokens) if ends_with_head(policy) else num_tokens
    logits = ((2 * chunk - num_tokens) * size + 2 * min(BLOCK, chunk) * 4) * shape[0]
    return logits + shape.numel() * own * (weight.requires_grad and chunk < num_tokens)


def activation_bytes(read: Callable[[Responses], None], model: Any, part: Responses) -> int:
    """Bytes that a forward pass keeps for the backward pass of a micro-batch.

    Args:
        read: a forward pass.
        part: rows of equal length; two of them are read.
    """

    def kept(num_rows: int) -> int:
        rows = part.select(torch.arange(num_rows, device=part.response_ids.device))
        return kept_bytes(partial(read, rows), model)

    one = kept(1)
    return one if len(part) == 1 else one + (len(part) - 1) * (kept(2) - one)


@torch.no_grad()
def cache_bytes_per_token(model: Any, part: Responses, kind: torch.dtype | None = None) -> int:
    """Bytes of keys and values that generation keeps of one token.

    Args:
        kind: their type; None: as the engine `loop` keeps what the model computes.
    """
    ids, mask = part.prompt_ids[:1], part.prompt_mask[:1]
    cache = roomy_cache(unwrap_peft(model).config)
    with eval_mode(model):  # gradient checkpointing drops the cache
        model(**prefill_inputs(model, ids, mask), past_key_values=cache, use_cache=True)
    size = cache_bytes(cache) if kind is None else kind.itemsize * cache_numbers(cache)
    return -(-size // ids.shape[1])


def prefill_bytes(model: Any, part: Responses, new_cache: Callable[[Any], DynamicCache]) -> int:
    """Bytes that reading a prompt takes at most, with its keys and values."""
    last_only = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}

    def read(num_rows: int) -> None:
        rows = torch.zeros(num_rows, dtype=torch.long, device=part.prompt_ids.device)
        inputs = prefill_inputs(model, part.prompt_ids[rows], part.prompt_mask[rows])
        cache = new_cache(unwrap_peft(model).config)
        model(**inputs, **last_only, past_key_values=cache, use_cache=True)

    with eval_mode(model):
        return passing_bytes(partial(read, 2)) - passing_bytes(partial(read, 1))


def scoring_bytes(
    model: Any, part: Responses, autocast: Callable[[], AbstractContextManager[None]]
) -> int:
    """Bytes that a reward model takes at most to score a response by its token ids; 0 for one that
    scores texts.

    Args:
        autocast: the context in which it is read; its weights may be stored as that reads them.
    """
    if not isinstance(model, ScalarModel):
        return 0

    def read(num_rows: int) -> None:
        ids = torch.zeros_like(part.sequence_ids[:1]).repeat(num_rows, 1)
        with autocast():  # of each pass: what it keeps of the weights is in both
            sequence_scores(model, ids, torch.ones_like(ids, dtype=torch.bool))

    return passing_bytes(partial(read, 2)) - passing_bytes(partial(read, 1))
