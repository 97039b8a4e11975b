"""One training step at the longest length that a run can meet, measured: seconds and memory."""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf.config import PPOStageConfig
from rlhf.ppo.preflight.findings import FAIL, OK, Finding
from rlhf.ppo.preflight.memory import (
    MemoryEstimate,
    is_out_of_memory,
    judge_share,
    read_kilobytes,
    remedy,
    size_text,
)
from rlhf.ppo.rollout import Rollout, policy_logprobs
from rlhf.ppo.trainer import PPOTrainer
from rlhf.ppo.update import text_loss


@dataclass
class Step:
    """What one forward and backward pass of policy and critic took, the most of any process.

    Attributes:
        rise: bytes above what was in use before; None where the system does not tell.
        problem: "out of memory", "not finite", or empty.
    """

    seconds: float
    rise: int | None
    problem: str


def examine_longest_step(
    step: Step, estimate: MemoryEstimate, free: int, part: Rollout, config: PPOStageConfig
) -> Finding:
    """Judge one step at the longest length; Adam's states will come on top.

    Args:
        free: bytes that this process could still get before the step.
    """
    name = "longest step"
    shape = f"{len(part)} x ({part.prompt_ids.shape[1]} + {part.response_ids.shape[1]}) tokens"
    text = f"{shape}: {step.seconds:.2f} s"
    if step.problem == "out of memory":
        return Finding(name, FAIL, f"{text}, out of memory", remedy(estimate, config))
    if step.problem:
        fix = "use precision=float32 and model.dtype=float32"
        return Finding(name, FAIL, f"{text}, and a loss that is {step.problem}", fix)
    if step.rise is None:
        return Finding(name, OK, text)
    needed = step.rise + estimate.sum("adam")
    text += f", {size_text(step.rise)}; with Adam states {size_text(needed)} of {size_text(free)}"
    status = judge_share(needed / max(free, 1))
    return Finding(name, status, text, remedy(estimate, config, status))


def longest_micro_batch(trainer: PPOTrainer) -> Rollout:
    """Build the largest micro-batch that training can meet on a process: the longest prompt, and
    responses that use the whole budget."""
    ppo, sampling = trainer.config.ppo, trainer.settings.sampling
    device, processes = trainer.accelerator.device, trainer.accelerator.num_processes
    num_rows = min(ppo.micro_batch_size, ppo.batch_size // ppo.num_mini_batches // processes)
    prompt = max((p["input_ids"] for p in trainer.prompts), key=len)
    prompt_ids = torch.tensor([prompt] * num_rows, device=device)
    forbidden = set(sampling.forbidden.tolist())
    token = next(i for i in itertools.count() if i not in forbidden)
    response_ids = torch.full((num_rows, sampling.max_new_tokens), token, device=device)
    zeros = torch.zeros(response_ids.shape, device=device)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=torch.ones_like(prompt_ids, dtype=torch.bool),
        response_ids=response_ids,
        response_mask=torch.ones_like(response_ids, dtype=torch.bool),
        loss_mask=torch.ones_like(response_ids, dtype=torch.bool),
        finished=torch.zeros(num_rows, dtype=torch.bool, device=device),
        sampler_logprobs=zeros,
        logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
        scores=zeros[:, 0],
        dense_rewards=zeros,
        component_scores=zeros[:, :0],
        cut=torch.zeros(num_rows, dtype=torch.bool, device=device),
        advantages=zeros + 1.0,
        returns=zeros,
    )


def measure_step(trainer: PPOTrainer, part: Rollout) -> Step:
    """Make one forward and backward pass of policy and critic; weights stay, gradients are dropped.

    Only the result is exchanged between processes: one that runs out of memory leaves no other
    waiting.
    """
    accelerator, device = trainer.accelerator, trainer.accelerator.device
    before = _reset_peak(device)
    began, problem = time.perf_counter(), 0
    try:
        problem = 0 if _forward_and_backward(trainer, part) else 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        problem = 2
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    peak = _peak(device)
    rise = -1 if before is None or peak is None else max(0, peak - before)
    seconds = time.perf_counter() - began
    for optimizer in trainer.optimization.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    mine = torch.tensor([[seconds, rise, problem]], dtype=torch.float64, device=device)
    seconds, rise, problem = accelerator.gather(mine).max(dim=0).values.tolist()
    problems = ("", "not finite", "out of memory")
    return Step(seconds, None if rise < 0 else int(rise), problems[int(problem)])


def _forward_and_backward(trainer: PPOTrainer, part: Rollout) -> bool:
    """Do what one micro-batch of an update does; False if a loss is not finite."""
    optimization, accelerator = trainer.optimization, trainer.accelerator
    optimization.kl_coef = trainer.kl_coef
    with torch.no_grad():
        part.logprobs, _ = policy_logprobs(
            trainer.actors.policy, part, trainer.settings.sampling
        )  # ratios of 1, as in training
    part.ref_logprobs = part.logprobs
    denominator = float(part.loss_mask.sum())
    losses = []
    with ExitStack() as stack:
        for model in (optimization.policy, optimization.critic):
            if model is not None:
                stack.enter_context(accelerator.no_sync(model))
        if optimization.has_critic:
            losses.append(optimization.critic_backward(part, denominator)["value_loss"])
        losses.append(optimization.policy_backward(part, denominator)["policy_loss"])
        if optimization.texts:
            texts = sorted(optimization.texts, key=len)[-trainer.config.ppo.micro_batch_size :]
            loss = text_loss(optimization.policy, texts, denominator)
            accelerator.backward(trainer.config.ptx.coef * loss)
            losses.append(loss.detach())
    return all(bool(loss.isfinite()) for loss in losses)


def _reset_peak(device: torch.device) -> int | None:
    """Start measuring the highest use; return the use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):  # refused in some containers: the peak is then that since the start
        Path("/proc/self/clear_refs").write_text("5")
    return read_kilobytes("/proc/self/status", "VmRSS")


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return read_kilobytes("/proc/self/status", "VmHWM")
