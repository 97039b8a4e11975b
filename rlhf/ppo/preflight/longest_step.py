"""One step of a PPO run at the longest length that training can meet: its time and its memory."""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf.config import PPOStageConfig
from rlhf.distributed import backward, syncing
from rlhf.ppo.passes import policy_logprobs, text_loss
from rlhf.ppo.preflight.findings import FAIL, OK, Finding
from rlhf.ppo.preflight.free_memory import is_out_of_memory, read_kilobytes
from rlhf.ppo.preflight.memory import MemoryEstimate, judge, remedy, size_text
from rlhf.ppo.rollout import Experience, Responses
from rlhf.ppo.trainer import PPOTrainer
from rlhf.ppo.update import LOSSES
from rlhf.sampling import Generation

MOST_TOKENS = 16384  # of a pass; more gain no speed on any GPU


@dataclass
class Step:
    """What one forward and backward pass of policy and critic took, the most of any process."""

    seconds: float
    rise: int | None  # bytes above what was in use before; None where the system does not tell
    problem: str  # "out of memory", "not finite", or empty


def examine_longest_step(
    step: Step, estimate: MemoryEstimate, free: int, part: Responses, config: PPOStageConfig
) -> Finding:
    """Judge one step at the longest length; Adam's states will come on top.

    Args:
        free: bytes that this process could still get before the step.
    """
    name = "longest step"
    shape = f"{len(part)} x ({part.prompt_ids.shape[1]} + {part.response_ids.shape[1]}) tokens"
    text = f"{shape}: {step.seconds:.2f} s"
    if isinstance(config.ppo.micro_batch_tokens, int):
        text = f"ppo.micro_batch_tokens={config.ppo.micro_batch_tokens}, {text}"
    if step.problem == "out of memory":
        return Finding(name, FAIL, f"{text}, out of memory", remedy(estimate, config))
    if step.problem:
        fix = "use precision=float32 and model.dtype=float32"
        return Finding(name, FAIL, f"{text}, and a loss that is {step.problem}", fix)
    if step.rise is None:
        return Finding(name, OK, text)
    needed = step.rise + estimate.sum("adam")
    status, fix = judge(needed / max(free, 1), estimate, config)
    text += f", {size_text(step.rise)}; with Adam states {size_text(needed)} of {size_text(free)}"
    return Finding(name, status, text, fix)


def measure_longest_step(
    trainer: PPOTrainer, estimate: MemoryEstimate, free: int, part: Responses
) -> tuple[Step, Responses]:
    """Measure a step on `part`. Where `ppo.micro_batch_tokens` is to be chosen, choose it before,
    in place: half of what the estimate leaves room for, and less while a step does not fit. Return
    the step and what was read in it.

    Args:
        free: bytes that this process can still get.
        part: see `longest_micro_batch`.
    """
    ppo, length = trainer.config.ppo, part.sequence_ids.shape[1]
    if not chooses_tokens(trainer):
        return measure_step(trainer, part), part
    room = free - estimate.sum("gradients", "adam")
    activations = max(model.activations for model in estimate.models.values())
    tokens = int(0.5 * room * len(part) * length / max(activations, 1))
    power = 1 << max(tokens, 1).bit_length() - 1  # of two, at most `tokens`
    ppo.micro_batch_tokens = max(length, min(power, MOST_TOKENS))
    while True:
        part = longest_micro_batch(trainer)
        step = measure_step(trainer, part)
        if step.problem != "out of memory" or len(part) == 1:
            return step, part
        ppo.micro_batch_tokens = max(length, ppo.micro_batch_tokens // 2)


def chooses_tokens(trainer: PPOTrainer) -> bool:
    """True while the preflight is to choose `ppo.micro_batch_tokens`."""
    ppo = trainer.config.ppo
    by_default = ppo.micro_batch_size is None and trainer.accelerator.device.type == "cuda"
    return ppo.micro_batch_tokens == "auto" or (ppo.micro_batch_tokens is None and by_default)


def longest_micro_batch(trainer: PPOTrainer) -> Responses:
    """Build the largest micro-batch that training can meet on a process: the longest prompt, and
    responses that use the whole budget."""
    ppo, sampling = trainer.config.ppo, trainer.sampling
    per_minibatch = ppo.batch_size // ppo.num_mini_batches // trainer.accelerator.num_processes
    prompt = max((p["input_ids"] for p in trainer.prompts), key=len)
    num_rows = min(ppo.rows_of(len(prompt) + sampling.max_new_tokens), per_minibatch)
    forbidden = set(sampling.forbidden.tolist())
    token = next(i for i in itertools.count() if i not in forbidden)
    ids, logprobs = [token] * sampling.max_new_tokens, [0.0] * sampling.max_new_tokens
    sampled = Generation([ids] * num_rows, [logprobs] * num_rows, [False] * num_rows)
    return Responses.padded([prompt] * num_rows, sampled, token, trainer.accelerator.device)


def measure_step(trainer: PPOTrainer, part: Responses) -> Step:
    """Make one forward and backward pass of policy and critic; weights stay, gradients are dropped.

    Only the result is exchanged between processes: one that runs out of memory leaves no other
    waiting.
    """
    device, problems = trainer.accelerator.device, ("", "not finite", "out of memory")
    before = _reset_peak(device)
    began, problem = time.perf_counter(), 0
    try:
        problem = 0 if _forward_and_backward(trainer, part) else 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        problem = 2
    peak = _peak(device)
    rise = -1 if before is None or peak is None else max(0, peak - before)
    seconds = time.perf_counter() - began
    for optimizer in trainer.updater.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    mine = torch.tensor([[seconds, rise, problem]], dtype=torch.float64, device=device)
    seconds, rise, problem = trainer.accelerator.gather(mine).max(dim=0).values.tolist()
    return Step(seconds, None if rise < 0 else int(rise), problems[int(problem)])


def _forward_and_backward(trainer: PPOTrainer, part: Responses) -> bool:
    """Do what one micro-batch of an update does; False if a loss is not finite."""
    updater, accelerator = trainer.updater, trainer.accelerator
    with torch.no_grad():
        logprobs, _ = policy_logprobs(trainer.actors.policy, part, trainer.sampling)
    batch = Experience.of_equal_advantages(part, logprobs)  # ratios of 1, as in training
    denominator = float(batch.loss_mask.sum())
    losses = []
    with ExitStack() as stack:
        stack.enter_context(syncing(updater.policy, False, accelerator))
        if updater.critic is not None:
            stack.enter_context(syncing(updater.critic, False, accelerator))
            losses.append(updater.critic_backward(batch, denominator)["value_loss"])
        policy = updater.policy_backward(batch, denominator, trainer.kl_coef)
        losses += [policy[name] for name in LOSSES if name in policy]
        if updater.texts:
            num_texts = trainer.config.ppo.rows_of(trainer.config.ptx.max_length)
            texts = sorted(updater.texts, key=len)[-num_texts:]
            loss = text_loss(updater.policy, texts, denominator)
            backward(updater.policy, trainer.config.ptx.coef * loss, accelerator)
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
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return read_kilobytes("/proc/self/status", "VmHWM")
