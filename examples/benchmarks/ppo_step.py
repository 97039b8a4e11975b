"""One PPO update of rlhf against one of TRL 1.12.0, the last TRL with a PPOTrainer.

Held equal: the weights of policy, reference, critic and reward model, the prompts, the number of
responses, epochs, minibatches, the learning rate, the KL coefficient, float32 (on a GPU bfloat16
autocast on both sides), one torch thread. On a CPU the sides take turns, update by update, so that
other load meets both, and `cpu_seconds` and the phases leave that load out (one thread); on a GPU
one runs after the other.

Not equal: the random numbers; rlhf clips gradients (TRL does not); rlhf reads
`ppo.micro_batch_size` rows at a time, TRL a whole minibatch, which it can split only by making
fewer optimiser steps. `--set` changes any setting of our side, e.g. to name a fast path.

`--lengths full`: every response runs to the limit. `half`: every token ends its response with the
same chance, so that the mean is half of the limit.

`--reward gold-count` is a comparison of learning: the score is the number of tokens of an eighth of
the vocabulary, divided by the limit, and the policy first learns for `--warm-steps` to end its
responses. There our critic starts from the policy, as it does wherever a function scores.

Run: python examples/benchmarks/ppo_step.py --preset small --lengths half
     python examples/benchmarks/ppo_step.py --preset tiny --minibatches 4 --updates 80 \\
         --reward gold-count --warm-steps 150 --lr 1e-3 --kl-coef 0.005
Needs TRL 1.12.0 in an environment of its own: make .venv-peers/.installed
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from parts import Worker, answer
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from transformers.utils.logging import disable_progress_bar
from world import (
    DEVICE,
    EOS,
    PAD,
    ROOT,
    SHAPES,
    clock,
    describe,
    end_responses,
    is_gold,
    machine,
    make_model,
    make_prompts,
    make_tokenizer,
    median,
    memory_in_use,
    num_matrix_weights,
    peak_since,
    table,
)

LIMITS = {"tiny": 32, "small": 64, "medium": 128, "1b": 256, "7b-lora": 512}  # response tokens
PHASES = ("seconds", "rollout", "scoring", "optimise")
HALF = 1.5936  # (1 - exp(-x)) / x = 1/2: x / limit is the chance of EOS for a mean of limit / 2
GOAL = 0.9  # a score of the learning comparison


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=LIMITS, default="small")
    parser.add_argument("--lengths", choices=("full", "half"), default="full")
    parser.add_argument("--sides", default="ours,trl", help="ours,trl or one of them")
    parser.add_argument("--set", nargs="+", default=[], help="settings of ours, key=value")
    parser.add_argument("--updates", type=int, default=4, help="the first is left out of medians")
    parser.add_argument("--batch", type=int, default=64, help="responses of an update")
    parser.add_argument(
        "--limit", type=int, help="longest response, tokens (default: the preset's)"
    )
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--reward", choices=("model", "gold-count"), default="model")
    parser.add_argument("--warm-steps", type=int, default=0, help="SFT steps before PPO")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trl-python", default=str(ROOT / ".venv-peers/bin/python"))
    parser.add_argument("--trl-path", help="a folder with TRL 1.12.0, first on TRL's PYTHONPATH")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.limit = options.limit or LIMITS[options.preset]
    if options.preset == "7b-lora" and "trl" in options.sides:
        print("TRL is left out: its PPO trains every weight of the critic, which is no LoRA run")
        options.sides = "ours"
    if "trl" in options.sides and not Path(options.trl_python).exists():
        parser.error(
            f"no TRL 1.12.0: {options.trl_python} does not exist; make .venv-peers/.installed "
            "makes it, --trl-python names another, and --sides ours goes without"
        )
    return options


# --- The world, on disk ---------------------------------------------------------------------------


def write_world(options: argparse.Namespace, folder: Path) -> None:
    """Write policy, reward model, tokenizer and prompts, which both sides load."""
    preset, dtype = options.preset, torch.float32
    if preset.startswith("7b"):
        dtype = torch.bfloat16
    prompts = make_prompts(preset, 1024, options.seed)
    policy = make_model(LlamaForCausalLM, preset, options.seed, dtype)
    if options.warm_steps:
        warm_up(policy, prompts, options)
    else:
        end_responses(policy, HALF / options.limit if options.lengths == "half" else 0.0)
    policy.save_pretrained(folder / "policy")
    reward = make_model(
        LlamaForSequenceClassification, preset, options.seed + 1, dtype, num_labels=1
    )
    reward.save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        make_tokenizer(preset).save_pretrained(folder / name)
    (folder / "prompts.json").write_text(json.dumps(prompts))
    del policy, reward
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def warm_up(model: Any, prompts: list[list[int]], options: argparse.Namespace) -> None:
    """Fit the policy to responses that walk up the vocabulary from the prompt and then stop."""
    rng, words = random.Random(options.seed + 7), model.config.vocab_size - 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(options.warm_steps):
        rows = []
        for prompt in rng.sample(prompts, 16):
            num, last = rng.randint(options.limit // 4, options.limit - 1), prompt[-2] - 4
            body = [4 + (last + j * rng.choice((1, 1, 1, 2))) % words for j in range(1, num)]
            rows.append([*prompt, *body, EOS])
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        labels = ids.where(ids != PAD, -100)
        model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


# --- Our side -------------------------------------------------------------------------------------


def run_ours(options: argparse.Namespace) -> None:
    """Make an update at each request, on the models that the stage would load."""
    import rlhf.ppo.rollout as rollout
    from rlhf import PPOTrainer
    from rlhf.distributed import make_accelerator
    from rlhf.ppo.actors import check_promises, load_actors, load_checked_tokenizer
    from rlhf.ppo.stage import with_sources

    def gold_count(prompts: list[str], responses: list[str]) -> list[float]:
        return [gold_share(response, options) for response in responses]

    scorer = gold_count if options.reward == "gold-count" else None
    config = with_sources(our_config(options), scorer)
    tokenizer, _ = load_checked_tokenizer(config)
    accelerator = make_accelerator(config.precision)
    actors = load_actors(config, tokenizer, scorer, accelerator)
    forward = check_promises(config, actors, accelerator)
    prompts = [
        {"prompt": tokenizer.decode(ids), "input_ids": ids}
        for ids in json.loads((options.folder / "prompts.json").read_text())
    ]
    trainer = PPOTrainer(config, actors, prompts, accelerator, options.folder)
    spent: dict[str, float] = {}

    def timed(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*arguments: Any, **more: Any) -> Any:
            began = clock()
            result = function(*arguments, **more)
            spent[name] = clock() - began
            return result

        setattr(owner, name, call)

    timed(rollout, "sample_and_score")
    timed(rollout, "score_sampled")
    timed(trainer, "collect")
    answer({"before": memory_in_use(), "forward": forward, "weights": weights_of(actors)})
    while sys.stdin.readline():
        began, worked = time.perf_counter(), clock()
        metrics = trainer.step()
        ended, worked = time.perf_counter(), clock() - worked
        sampled = spent["sample_and_score"] - spent["score_sampled"]
        answer(
            {
                "seconds": ended - began,
                "cpu_seconds": worked,
                "rollout": sampled,
                "scoring": spent["collect"] - sampled,
                "optimise": worked - spent["collect"],
                "tokens": metrics["response_length"] * options.batch,
                "score": metrics["score"],
                "kl": metrics["kl"],
            }
        )
    answer({"peak": peak_since()})


def gold_share(response: str, options: argparse.Namespace) -> float:
    """Gold tokens of a response, divided by the limit; words such as <sep> are none."""
    ids = [int(word[1:]) for word in response.split() if word.startswith("t")]
    good = is_gold(torch.tensor(ids, dtype=torch.long), SHAPES[options.preset][4])
    return float(good.sum()) / options.limit


def our_config(options: argparse.Namespace) -> Any:
    """The stage's settings: what the sides have in common, defaults, and `--set`."""
    from omegaconf import OmegaConf

    from rlhf.config import PPOStageConfig, schema

    gpu, lora, gold = DEVICE == "cuda", options.preset == "7b-lora", options.reward != "model"
    values: dict[str, Any] = {
        "model": {"path": str(options.folder / "policy")},
        "peft": {"enabled": lora},
        "ppo": {
            "num_updates": options.updates,
            "batch_size": options.batch,
            "num_mini_batches": options.minibatches,
            "num_ppo_epochs": options.epochs,
            "response_length": options.limit,
            "learning_rate": options.lr,
            "lr_schedule": "constant",
            "kl_coef": options.kl_coef,
            "missing_eos_penalty": None,
        },
        "critic": {"learning_rate": options.lr},
        "seed": options.seed,
    }
    if not gold:
        values["scorer"] = {"path": str(options.folder / "reward"), "normalize": "none"}
    if gpu and not lora:
        values["ppo"]["micro_batch_size"] = options.batch // options.minibatches
    if gpu and lora:
        values["model"]["dtype"] = "bfloat16"
    merged = OmegaConf.merge(schema(PPOStageConfig), values, OmegaConf.from_dotlist(options.set))
    return OmegaConf.to_object(merged)


def weights_of(actors: Any) -> list[int]:
    """Matrix weights that an update applies to every token, and to each response token."""
    each, head = num_matrix_weights(actors.policy)
    if actors.critic is not None and getattr(actors.critic, "model", None) is not None:
        each += num_matrix_weights(actors.critic.model)[0]
    return [each, head]


# --- Both sides -----------------------------------------------------------------------------------


class Side(Worker):
    """A process that makes updates of one side."""

    def __init__(self, name: str, options: argparse.Namespace, folder: Path):
        python = options.trl_python if name == "trl" else sys.executable
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        if name == "trl" and options.trl_path:
            path.insert(0, options.trl_path)
        command = [python, __file__, *sys.argv[1:], "--sides", name, "--folder", str(folder)]
        environment = {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
        super().__init__(name, command, environment)
        self.rows: list[dict[str, float]] = []
        self.found = self.read()

    def update(self) -> None:
        row = self.ask()
        if not all(map(math.isfinite, row.values())):
            raise SystemExit(f"{self.name}: not finite: {row}")
        self.rows.append(row)
        text = f"{self.name}: update {len(self.rows)}, {row['seconds']:.2f} s"
        print(f"{text}, score {row['score']:.3f}, KL {row['kl']:.3f}", file=sys.stderr)


def run_sides(options: argparse.Namespace, folder: Path) -> list[Side]:
    """Alternate the updates of the sides; on a GPU run one side after the other."""
    names = options.sides.split(",")
    done: list[Side] = []
    for group in [[name] for name in names] if DEVICE == "cuda" else [names]:
        sides = [Side(name, options, folder) for name in group]
        for _ in range(options.updates):
            for side in sides:
                side.update()
        for side in sides:
            side.found |= side.end()
        done += sides
    return done


def summary(side: Side, options: argparse.Namespace, limits: dict, prompt_tokens: float) -> dict:
    """Medians without the first update, memory, and the share of the machine's rate."""
    timed = side.rows[1:] or side.rows
    result: dict[str, Any] = {
        name: median(timed, name) for name in (*PHASES, "cpu_seconds", "tokens")
    }
    each, head = side.found["weights"]
    work = (
        6
        * options.epochs
        * (each * (options.batch * prompt_tokens + result["tokens"]) + head * result["tokens"])
    )
    result["optimise_share"] = work / result["optimise"] / limits["flops_per_second"]
    result |= {"ms_per_token": 1e3 * result["seconds"] / result["tokens"]}
    peak, before = side.found["peak"], side.found["before"]
    result |= {"peak_mib": peak, "growth_mib": peak - before, "forward": side.found["forward"]}
    return result


def learning(side: Side) -> dict[str, Any]:
    """When the score first reached the goal: update, seconds and CPU seconds until then, KL; null
    if never."""
    for number, row in enumerate(side.rows):
        if row["score"] >= GOAL:
            until = side.rows[: number + 1]
            spent = {name: sum(r[name] for r in until) for name in ("seconds", "cpu_seconds")}
            return {"update": number + 1, **spent, "kl": row["kl"]}
    return {"update": None, "best": max(row["score"] for row in side.rows)}


def report(sides: list[Side], options: argparse.Namespace, limits: dict, prompts: Any) -> dict:
    """Print the table; return what the last line holds."""
    mean = statistics.mean(map(len, prompts))
    found = {side.name: summary(side, options, limits, mean) for side in sides}
    columns = [*PHASES, "cpu_seconds", "tokens", "ms_per_token", "optimise_share", "peak_mib"]
    print(table(["side", *columns], [[n, *(found[n][c] for c in columns)] for n in found]))
    result: dict[str, Any] = {"ratio_to_trl": None, "memory_ratio_to_trl": None}
    main = found.get("ours", found[sides[0].name])
    result |= {"seconds": main["seconds"], "peak_mib": main["peak_mib"]}
    if len(sides) == 2:
        ours, trl = (next(s for s in sides if s.name == name) for name in ("ours", "trl"))
        pairs = list(zip(ours.rows, trl.rows, strict=True))
        pairs = pairs[1:] or pairs
        for name, clock in (("ratio_to_trl", "seconds"), ("cpu_ratio_to_trl", "cpu_seconds")):
            result[name] = statistics.median(a[clock] / b[clock] for a, b in pairs)
        for kind in ("peak", "growth"):
            name = "memory_ratio_to_trl" if kind == "peak" else "growth_ratio_to_trl"
            result[name] = found["ours"][f"{kind}_mib"] / found["trl"][f"{kind}_mib"]
        phases = {p: found["ours"][p] / found["trl"][p] for p in PHASES[1:]}
        print(
            f"\nours / TRL: time {result['ratio_to_trl']:.2f} ("
            + ", ".join(f"{name} {ratio:.2f}" for name, ratio in phases.items())
            + f"), CPU time {result['cpu_ratio_to_trl']:.2f}, "
            f"peak memory {result['memory_ratio_to_trl']:.2f}, "
            f"memory beyond the loaded models {result['growth_ratio_to_trl']:.2f}"
        )
    if options.reward == "gold-count":
        result["learning"] = {side.name: learning(side) for side in sides}
        result["curves"] = {s.name: [[r["score"], r["kl"]] for r in s.rows] for s in sides}
        for name, facts in result["learning"].items():
            print(f"{name}: score {GOAL}: {facts}")
    phases_of = {name: {p: values[p] for p in PHASES} for name, values in found.items()}
    return result | {"phases": phases_of, "headline": headline(result, main), "sides": found}


def headline(result: dict[str, Any], main: dict[str, Any]) -> str:
    """One line for a table of several benchmarks."""
    parts = ", ".join(f"{name} {main[name]:.3g}" for name in PHASES[1:])
    text = f"update {main['seconds']:.3g} s ({parts}), {main['peak_mib']:,.0f} MiB"
    text += f"; optimise at {main['optimise_share']:.0%} of the machine's rate"
    if result["ratio_to_trl"] is None:
        return text
    ratios = (result[f"{name}ratio_to_trl"] for name in ("", "cpu_", "memory_"))
    words = "{:.2f} of TRL's time ({:.2f} of its CPU time), {:.2f} of its memory; "
    return words.format(*ratios) + text


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.folder:
        if options.sides == "ours":
            return run_ours(options)
        from ppo_step_trl import run_trl

        return run_trl(options)
    disable_progress_bar()
    limits = machine()
    print(describe(limits), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(options, folder)
        sides = run_sides(options, folder)
        prompts = json.loads((folder / "prompts.json").read_text())
    result = report(sides, options, limits, prompts)
    settings = {k: v for k, v in vars(options).items() if k != "folder"}
    print(json.dumps(result | {"machine": limits, "settings": settings}))


if __name__ == "__main__":
    main()
