"""What a diagnosis means in words, and the commands to try."""

from __future__ import annotations

import shlex
from typing import Any

from rlhf.checkpoint.config_changes import length_of
from rlhf.config import (
    CONFIG_FILE,
    STAGES,
    InputError,
    has_weights,
    learning_rates,
    load_config,
    resume_overrides,
)
from rlhf.console import estimate_text
from rlhf.diagnose.options import Subject
from rlhf.diagnose.weakest_link import Findings

NAMES = {"sft": "the SFT policy", "reward": "the reward model", "ppo": "PPO"}


def verdict(found: Findings) -> str:
    """The weakest link in one sentence."""
    gains, stage = found["gains"], found["weakest"]
    if found["reason"] == "chance":
        text = estimate_text(found["accuracy"])
        return f"weakest link: the reward model, which is near chance on held-out rankings ({text})"
    if stage is None and not gains:
        return "no stage can be compared: there is no gold score, no PPO and no known-good answer"
    first = max(gains, key=lambda name: gains[name]["mean"])
    best = estimate_text(gains[first], "+")
    if found["reason"] == "small":
        return f"no stage is at fault: no swap gains much, the most that of {NAMES[first]} ({best})"
    if stage is None:
        second = sorted(gains, key=lambda name: -gains[name]["mean"])[1]
        return (
            f"no stage is clearly weakest: {NAMES[first]} ({best}) and {NAMES[second]} "
            f"({estimate_text(gains[second], '+')}) cannot be told apart; raise num_prompts"
        )
    return f"weakest link: {NAMES[stage]}; a known-good one in its place would gain {best}"


def stopping_text(found: Findings) -> list[str]:
    """Where to stop, in words and as a setting."""
    point = found.get("stopping_point")
    if point is None:
        return []
    n, most = point["largest_n"], point["largest_kl"]
    if point["verdict"] == "never rises":
        return [
            f"stopping point: best of n by the scorer does not raise the {point['unit']} up to n = "
            f"{n}: PPO against this scorer cannot help"
        ]
    if point["verdict"] == "rises":
        more = "more samples_per_prompt look further" if found["gold"] else "gold= looks further"
        return [
            f"stopping point: none up to n = {n} ({most:.2f} nats per response): the "
            f"{point['unit']} still rises. Beyond that nothing was measured and nothing is "
            f"guessed; {more}",
            f"  watchdog.kl_budget: {most:.2g} or more",
        ]
    kl, proxy = point["kl"], point["proxy"]
    high = f"{most:.2f} or more" if kl["high"] is None else f"{kl['high']:.2f}"
    return [
        f"stopping point: best of n turns down at a KL of {kl['mean']:.2f} [{kl['low']:.2f}, "
        f"{high}] nats per response, where the scorer gives {estimate_text(proxy)}. PPO needs more "
        "KL than best of n for the same score: a budget, not a goal",
        f"  watchdog.kl_budget={kl['mean']:.2g}",
    ]


def commands(found: Findings, subject: Subject) -> list[str]:
    """What to try, a line each; those of the weakest link, else none."""
    stage = found["weakest"]
    if stage is None:
        return []
    return {"sft": _for_sft, "reward": _for_reward, "ppo": _for_ppo}[stage](found, subject)


def _for_sft(found: Findings, subject: Subject) -> list[str]:
    lines = [f"  python -m rlhf.chat {_quoted(path=subject.sft)}", *_longer(subject, "sft")]
    if found["eos_rate"] < 0.9:
        what = f"  only {found['eos_rate']:.0%} of its answers end"
        lines.append(
            f"{what}: raise ppo.response_length, or train on answers that all end with EOS"
        )
    return [
        *lines,
        "  then run the later stages again; more, and better, demonstrations help more than steps",
    ]


def _for_reward(found: Findings, subject: Subject) -> list[str]:
    if not has_weights(subject.scorer.path):
        return [f"  correct the scorer {subject.scorer_name}: it prefers other answers than gold"]
    path = str(subject.scorer.path)
    lines = [
        f"  python -m rlhf.reward.report {_quoted(path=path)}",
        f"  python -m rlhf.rank prompts=prompts.jsonl {_quoted(path=subject.sft)}"
        " samples_per_prompt=4",
        *_longer(subject, "reward"),
        "  then run PPO again, on the new reward model",
    ]
    if found["over_optimised"]:
        coef = subject.config.ppo.kl_coef
        budget = found["best_of_n"][-1]["kl"]
        lines.append(
            "  PPO raised the scorer's score and lowered gold: until then your PPO command with "
            f"ppo.kl_coef={max(0.05, 2 * coef):g} watchdog.kl_budget={budget:.2g}"
        )
    return lines


def _for_ppo(found: Findings, subject: Subject) -> list[str]:
    ppo = subject.config.ppo
    kl = next(row["kl"] for row in found["answers"] if row["name"] == "PPO")
    rate = learning_rates(subject.config)["ppo.learning_rate"]
    if kl < found["best_of_n"][-1]["kl"]:
        larger = 3 * rate or 1e-5
        less = f" ppo.kl_coef={ppo.kl_coef / 2:g}" if ppo.kl_coef else ""
        return [
            f"  PPO moved only {kl:.2g} nats from the SFT policy; give it more updates, or larger "
            "steps",
            *_longer(subject, "ppo"),
            f"  or your PPO command with another run_name and ppo.learning_rate={larger:g}{less}",
        ]
    return [
        f"  PPO spent {kl:.2g} nats of KL and has less of the scorer's score than best of n has at "
        f"{found['best_of_n'][-1]['kl']:.2g}: smaller steps",
        f"  your PPO command with another run_name and ppo.learning_rate={rate / 3:g} "
        f"ppo.kl_coef={max(0.02, 2 * ppo.kl_coef):g}",
    ]


def _longer(subject: Subject, stage: str) -> list[str]:
    """The command that makes a stage of the run twice as long; none where it is not of the run."""
    final = subject.finals.get(stage)
    if final is None:
        return []
    try:
        config: Any = load_config(STAGES[stage], final / CONFIG_FILE)
    except InputError:
        return []
    config.run_name, config.runs_dir = final.parents[1].name, str(final.parents[2])
    name, value = length_of(config)
    return [f"  python -m rlhf.{stage} {resume_overrides(config)} {name}={2 * value:g}"]


def _quoted(**options: str) -> str:
    return " ".join(shlex.quote(f"{name}={value}") for name, value in options.items())
