"""The preflight: what goes wrong in a PPO run, looked for before it is trained.

Every check runs on the models, data, scorer and device of the run itself and names the knob that
helps. A FAIL stops the run; a WARN does not. Weights, gradients, optimisers and random numbers are
as before afterwards: training is the same with and without. Memory is in `memory`.

    python -m rlhf.ppo recipe=demo preflight=only     look, and train nothing
"""

from __future__ import annotations

import os
import random
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from rlhf.config import InputError
from rlhf.console import say
from rlhf.functional import whiten
from rlhf.models import use_bfloat16
from rlhf.ppo.evaluation import response_ids, response_texts
from rlhf.ppo.preflight.findings import (
    FAIL,
    WARN,
    Check,
    check_best_of_n,
    check_first_ratio,
    check_length,
    check_memory,
    check_penalty,
    check_scorer,
    check_step,
    check_stop_token,
    check_tokenizer,
)
from rlhf.ppo.preflight.memory import (
    estimate_memory,
    free_bytes,
    is_out_of_memory,
    longest_micro_batch,
    measure_step,
)
from rlhf.ppo.rollout import Rollout, collect, policy_logprobs, score_sampled, share_of
from rlhf.ppo.trainer import PPOTrainer
from rlhf.sampling import Generation, context_length, generate, uniform_noise
from rlhf.scorers import Scorer, Scores, Tokens, score_responses

PREFLIGHT_KEY = (1 << 31) + 1  # names the random numbers; no update, nor the evaluation, has it
NUM_PROMPTS, NUM_SAMPLES = 16, 16
WIDTH, INDENT = 110, 20


class PreflightFailed(InputError):
    """At least one check failed; the report has been printed."""


@dataclass
class Samples:
    """Responses of the policy before training: `NUM_SAMPLES` to each prompt, one prompt after the
    other.

    Attributes:
        prompts: encoded prompts, one per response.
        rollout: their responses, without scores.
        ids, texts: the same as token ids and as text.
    """

    prompts: list[dict[str, Any]]
    rollout: Rollout
    ids: list[list[int]]
    texts: list[str]


def run_preflight(
    trainer: PPOTrainer,
    heldout: Sequence[dict[str, Any]],
    independent: Scorer | None = None,
) -> list[Check]:
    """Make every check and print the report.

    Args:
        trainer: as it is before its first step.
        heldout: encoded prompts; without any, training prompts are used.
        independent: the scorer of `evaluation.scorer`.

    Returns:
        The checks, the same on every process.

    Raises:
        PreflightFailed: names what failed and the remedies, on every process.
    """
    began = time.perf_counter()
    prompts = list(heldout or trainer.prompts)[:NUM_PROMPTS]
    with _random_state_kept(trainer.accelerator.device):
        fix = "set model.gradient_checkpointing=true or peft=lora"
        look = partial(_capacity_checks, trainer, independent)
        checks = _or_out_of_memory(trainer, "memory", fix, look)
        fix = f"set ppo.rollout_batch_size={max(1, trainer.config.ppo.rollout_batch_size // 2)}"
        look = partial(_sample_checks, trainer, prompts, independent)
        checks += _or_out_of_memory(trainer, "sampling", fix, look)
    broadcast_object_list(everywhere := [checks])  # those of the main process
    checks = everywhere[0]
    kind = "held-out" if heldout else "training"
    say(f"preflight: {NUM_SAMPLES} responses to each of {len(prompts)} {kind} prompts")
    say(report(checks))
    say(f"preflight: {bottom_line(checks)} ({time.perf_counter() - began:.1f} s)")
    failed = [check for check in checks if check.status == FAIL]
    if failed:
        problems = "\n".join(f"  {c.name}: {c.text}; {c.remedy}" for c in failed)
        raise PreflightFailed(
            f"preflight failed, nothing was trained:\n{problems}\n"
            "preflight=false trains nevertheless"
        )
    return checks


def report(checks: Sequence[Check]) -> str:
    """Lay out checks, a line each, with the remedy below."""
    lines = []
    for check in checks:
        head = f"{check.status:<6}{check.name:<{INDENT - 6}}"
        lines += textwrap.wrap(head + check.text, WIDTH, subsequent_indent=" " * INDENT)
        lines += [" " * INDENT + line for line in check.details.splitlines()]
        if check.remedy:
            arrow = " " * (INDENT - 3) + "-> "
            lines += textwrap.wrap(arrow + check.remedy, WIDTH, subsequent_indent=" " * INDENT)
    return "\n".join(lines)


def bottom_line(checks: Sequence[Check]) -> str:
    """Sum up checks: "ok", "2 warnings" or "failed: memory, scorer"."""
    failed = [check.name for check in checks if check.status == FAIL]
    num_warnings = sum(check.status == WARN for check in checks)
    if failed:
        return f"failed: {', '.join(failed)}"
    return f"{num_warnings} warning{'s' * (num_warnings > 1)}" if num_warnings else "ok"


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Put every global random generator back afterwards: a scorer may draw from any."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def _or_out_of_memory(
    trainer: PPOTrainer, name: str, fix: str, look: Callable[[], list[Check]]
) -> list[Check]:
    """Make some checks; where memory ends, that is the finding."""
    try:
        return look()
    except (MemoryError, RuntimeError) as error:
        # with several processes it ends the job: the others wait for this one
        if not is_out_of_memory(error) or trainer.accelerator.num_processes > 1:
            raise
    return [Check(name, FAIL, "out of memory", fix)]


# --- Memory and the longest step ------------------------------------------------------------------


def _capacity_checks(trainer: PPOTrainer, independent: Scorer | None) -> list[Check]:
    """Check that the run fits; every process makes the same exchanges."""
    config, device = trainer.config, trainer.accelerator.device
    part = longest_micro_batch(trainer)
    free = free_bytes(device)
    if device.type == "cpu":  # shared by the processes of this machine
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = int(trainer.accelerator.gather(torch.tensor([free], device=device)).min())
    estimate = estimate_memory(trainer, part, independent)
    checks = [check_memory(estimate, free + estimate.sum("weights"), config)]
    if checks[0].status != FAIL:  # without swap, a system rather kills a process than say no
        step = measure_step(trainer, part)
        checks.append(check_step(step, estimate, free, part, config))
    return checks


# --- What the policy says, and what the scorer makes of it ----------------------------------------


def _sample_checks(
    trainer: PPOTrainer, prompts: list[dict[str, Any]], independent: Scorer | None
) -> list[Check]:
    """Sample on all processes together; then look, on the main one alone."""
    accelerator, config = trainer.accelerator, trainer.config
    rows = [prompt for prompt in prompts for _ in range(NUM_SAMPLES)]
    padded = rows + rows[-1:] * (-len(rows) % accelerator.num_processes)
    first = min(config.ppo.micro_batch_size * accelerator.num_processes, len(padded))
    order = torch.arange(len(padded), device=accelerator.device)
    minibatches = [part for part in order.tensor_split([first]) if len(part)]
    rollout = collect(
        replace(trainer.actors, scorer=_no_scores),
        padded,
        (config.seed, PREFLIGHT_KEY),
        replace(trainer.settings, missing_eos_penalty=None),
        accelerator,
        minibatches,
        with_values=False,
    )
    deviation = first_ratio_deviation(trainer, rollout, minibatches[0])
    if not accelerator.is_main_process:
        return []
    tokenizer, watchdog = trainer.actors.tokenizer, config.watchdog
    eos, sampling = tokenizer.eos_token_id, trainer.settings.sampling
    longer = partial(_sample_longer, trainer, prompts)
    rollout = rollout.select(order[: len(rows)])
    texts = response_texts(rollout, tokenizer, rows)
    samples = Samples(rows, rollout, response_ids(rollout), texts)
    checks = [
        check_first_ratio(deviation, rollout, watchdog.first_ratio),
        check_tokenizer(tokenizer, [p["prompt"] for p in prompts], samples.texts),
        check_stop_token(eos, sampling, rollout, watchdog.eos_rate, longer),
    ]
    fix = f"set scorer.batch_size={max(1, config.scorer.batch_size // 2)}"
    with accelerator.autocast():  # as in `collect`
        look = partial(_scorer_checks, trainer, samples, independent)
        return [*checks, *_or_out_of_memory(trainer, "scorer", fix, look)]


def _sample_longer(
    trainer: PPOTrainer, prompts: Sequence[dict[str, Any]]
) -> tuple[int, Generation]:
    """Sample four responses to each prompt with four times the budget, or what the context has."""
    policy, sampling = trainer.actors.policy, trainer.settings.sampling
    ids = [p["input_ids"] for p in prompts for _ in range(4)]
    budget = min(4 * sampling.max_new_tokens, context_length(policy) - max(map(len, ids)))
    noise = uniform_noise((trainer.config.seed, PREFLIGHT_KEY), range(len(ids)), budget)
    longer = replace(sampling, max_new_tokens=budget)
    with trainer.accelerator.autocast():
        batch_size = max(1, trainer.config.ppo.rollout_batch_size // 4)  # the cache is longer too
        return budget, generate(policy, ids, longer, noise, batch_size)


def _no_scores(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """Stand in for the scorer, which the main process calls later."""
    return [0.0] * len(responses)


def first_ratio_deviation(trainer: PPOTrainer, rollout: Rollout, minibatch: Tensor) -> float:
    """Read the first minibatch as training does: largest |ratio - 1| on any process."""
    policy, accelerator = trainer.actors.policy, trainer.accelerator
    largest = torch.zeros((), device=accelerator.device)
    mine = rollout.select(share_of(minibatch, accelerator))
    with accelerator.autocast():  # with gradients, as in training
        for _, part in mine.micro_batches(trainer.config.ppo.micro_batch_size):
            logprobs, _ = policy_logprobs(policy, part, trainer.settings.sampling)
            log_ratio = (logprobs.detach() - part.logprobs)[part.response_mask]
            largest = torch.maximum(largest, torch.expm1(log_ratio).abs().max())
    return float(accelerator.gather(largest[None]).max())


def _scorer_checks(
    trainer: PPOTrainer, samples: Samples, independent: Scorer | None
) -> list[Check]:
    """Check the scorer on the samples, and what choosing by it is worth."""
    without_penalty = replace(trainer.settings, missing_eos_penalty=None)
    finished, lengths = samples.rollout.finished.cpu(), samples.rollout.lengths.cpu()

    def score(rows: Sequence[int]) -> Scores:
        return score_sampled(
            trainer.actors,
            [samples.prompts[row] for row in rows],
            [samples.ids[row] for row in rows],
            [True] * len(rows),
            without_penalty,
        )

    watchdog, ppo = trainer.config.watchdog, trainer.config.ppo
    penalty = ppo.missing_eos_penalty
    least_std = watchdog.score_std or 0.0
    tolerance = 1e-2 if use_bfloat16(trainer.config.precision) else 1e-4
    try:
        scores = score(range(len(samples.ids)))
        total = scores.total
        check = check_scorer(lambda rows: score(rows).total, total, lengths, least_std, tolerance)
    except InputError as error:
        return [Check("scorer", FAIL, str(error), "correct the scorer, or its input")]
    if check.status == FAIL:
        return [check]
    checks = [check, check_length(total, lengths)]
    if ppo.whiten_scores:  # as in a rollout, before the penalty
        total = whiten(total, torch.ones_like(finished))
    if penalty is not None:
        checks.append(check_penalty(total[finished], penalty))
        total = torch.where(finished, total, penalty + scores.dense_total)  # as in a rollout
    try:
        judged = _judge(trainer, samples, independent)
    except InputError as error:
        fix = "correct it, or set evaluation.scorer=null"
        return [*checks, Check("best of n", FAIL, str(error), fix)]
    return [*checks, check_best_of_n(total.view(-1, NUM_SAMPLES), judged, least_std)]


def _judge(trainer: PPOTrainer, samples: Samples, independent: Scorer | None) -> Tensor | None:
    """Scores of the samples by the independent scorer, (P, NUM_SAMPLES)."""
    if independent is None:
        return None
    tokens = Tokens(
        [p["input_ids"] for p in samples.prompts], samples.ids, trainer.actors.tokenizer_hash
    )
    prompts = [p["prompt"] for p in samples.prompts]
    scores = score_responses(independent, prompts, samples.texts, "evaluation.scorer", tokens)
    return scores.total.view(-1, NUM_SAMPLES)
