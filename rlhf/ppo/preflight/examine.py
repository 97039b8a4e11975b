"""The preflight in order: memory, the longest step, the policy's samples, the scorer.

Every examination uses the models, data, scorer and device of the run itself. A FAIL stops the run;
a WARN does not. Weights, gradients, optimisers and random numbers are as before afterwards: a run
trains the same with the preflight and without.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from rlhf.checkpoint.state import random_state, restore_random_state
from rlhf.config import InputError
from rlhf.console import say
from rlhf.distributed import is_sharded
from rlhf.ppo.preflight.findings import FAIL, Finding, bottom_line, lay_out, mended_command
from rlhf.ppo.preflight.free_memory import free_bytes, is_out_of_memory
from rlhf.ppo.preflight.longest_step import (
    examine_longest_step,
    longest_micro_batch,
    measure_longest_step,
)
from rlhf.ppo.preflight.memory import (
    checkpoint_bytes,
    copies_checkpoint,
    estimate_memory,
    examine_main_memory,
    examine_memory,
)
from rlhf.ppo.preflight.samples import NUM_SAMPLES, examine_policy, examine_scoring, sample_policy
from rlhf.ppo.trainer import PPOTrainer
from rlhf.sampling import engine_of
from rlhf.scorers import Scorer, reward_models

NUM_PROMPTS = 16


class PreflightFailed(InputError):
    """At least one examination failed; the findings have been printed."""


def run_preflight(
    trainer: PPOTrainer, heldout: Sequence[dict[str, Any]], independent: Scorer | None = None
) -> list[Finding]:
    """Examine everything, and print the findings; every process returns those of the main process.

    Args:
        trainer: before its first step.
        heldout: encoded prompts; if empty, training prompts are used.
        independent: the scorer of `evaluation.scorer`.

    Raises:
        PreflightFailed: names what failed and the remedies, on every process.
    """
    began = time.perf_counter()
    prompts = list(heldout or trainer.prompts)[:NUM_PROMPTS]
    before = random_state()  # a scorer may draw from any generator
    try:
        findings = [_examine_all(trainer, prompts, independent)]
    finally:
        restore_random_state(before)
    broadcast_object_list(findings)  # those of the main process
    kind = "held-out" if heldout else "training"
    say(f"preflight: {NUM_SAMPLES} responses to each of {len(prompts)} {kind} prompts")
    say(lay_out(findings[0]))
    say(f"preflight: {bottom_line(findings[0])} ({time.perf_counter() - began:.1f} s)")
    failed = [finding for finding in findings[0] if finding.status == FAIL]
    if failed:
        problems = "\n".join(f"  {f.name}: {f.text}; {f.remedy}" for f in failed)
        command = mended_command(failed)
        way = f"this mends it:\n\n{command}" if command else ""
        if way and trainer.config.preflight == "only":  # whose exception is not printed
            say(way)
        raise PreflightFailed(
            f"preflight failed, nothing was trained:\n{problems}\n"
            f"preflight=false trains nevertheless{'; ' * bool(way)}{way}"
        )
    return findings[0]


def _examine_all(
    trainer: PPOTrainer, prompts: list[dict[str, Any]], independent: Scorer | None
) -> list[Finding]:
    """All findings on the main process; on the others, those of the device."""
    config, accelerator = trainer.config, trainer.accelerator
    findings: list[Finding] = []
    samples = None

    @contextmanager
    def out_of_memory_found(name: str, fix: str) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            # with several processes it must end the job: the others wait for this one
            if not is_out_of_memory(error) or accelerator.num_processes > 1:
                raise
            findings.append(Finding(name, FAIL, "out of memory", fix))

    with out_of_memory_found("memory", "set model.gradient_checkpointing=true or peft=lora"):
        findings += _examine_device(trainer, independent)
    fix = f"set ppo.rollout_batch_size={max(1, config.ppo.rollout_batch_size // 2)}"
    with out_of_memory_found("sampling", fix):
        samples = sample_policy(trainer, prompts)
        if accelerator.is_main_process:
            findings += examine_policy(trainer, samples)
        elif engine_of(trainer.actors.policy).reads_slices:
            examine_policy(trainer, samples)  # the main process cannot sample alone
    fix = f"set scorer.batch_size={max(1, config.scorer.batch_size // 2)}"
    with out_of_memory_found("scorer", fix):
        models = [m.model for m in reward_models(trainer.actors.scorer)]
        if samples is not None and accelerator.is_main_process:
            findings += examine_scoring(trainer, samples, independent)
        elif samples is not None and any(map(is_sharded, models)):
            examine_scoring(trainer, samples, None)  # the main process cannot read slices alone
    return findings


def free_here(device: torch.device) -> tuple[int, int]:
    """Bytes of main memory, and of its device, that this process can still get."""
    # main memory is shared by the processes of this machine
    main = free_bytes(torch.device("cpu")) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return main, main if device.type == "cpu" else free_bytes(device)


def _examine_device(trainer: PPOTrainer, independent: Scorer | None) -> list[Finding]:
    """Examine whether the run fits; every process makes the same exchanges."""
    config, device = trainer.config, trainer.accelerator.device
    part = longest_micro_batch(trainer)
    mine = torch.tensor([free_here(device)], device=device)
    main, free = trainer.accelerator.gather(mine).min(dim=0).values.tolist()
    estimate = estimate_memory(trainer, part, independent)
    findings = [examine_memory(estimate, free + estimate.sum("weights"), config)]
    if device.type != "cpu" and copies_checkpoint(trainer):
        findings.append(examine_main_memory(checkpoint_bytes(trainer), main))
    if findings[0].status != FAIL:  # a system without swap kills the process rather than say no
        step, part = measure_longest_step(trainer, estimate, free, part)
        findings.append(examine_longest_step(step, estimate, free, part, config))
    return findings
