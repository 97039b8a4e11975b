"""Peak memory of each phase of a PPO update, next to what the preflight estimated.

Each case is a child process: it loads the models as the stage does, lets the preflight estimate,
and makes two updates. Reported is the second, which has Adam's states. Prompts have 64 tokens and
responses run to the limit, which is what the preflight reckons with. Memory is that of tensors: on
a GPU what torch allocated; on a CPU the tensors that a phase finds, and torch's record of what it
allocates. Python and libraries, which take a few hundred MiB at any size of the model, do not count
(`ppo_step.py` measures the process).

    load       models, and the checks on them   not estimated
    rollout    sampling and the scorer          estimate: weights, Adam's states, and the most of
                                                the prompts, cache and logits, and the scorer
    scoring    log-probs, reference, values     not estimated: less than the others
    optimise   forward, backward, optimiser     estimate: weights, Adam's states, gradients,
                                                activations

Left out: several processes, evaluation, saving.

Run: python examples/benchmarks/memory.py --preset small
     python examples/benchmarks/memory.py --preset 7b-lora --cases model.dtype=bfloat16
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import ppo_step
import torch
from parts import Worker, answer
from transformers.utils.logging import disable_progress_bar
from world import DEVICE, ROOT, describe, machine, table

SHARED = "peft.enabled=true,ppo.share_base=true"
CASES = [
    "",
    "peft.enabled=true",
    SHARED,
    "ppo.micro_batch_size=2",
    "model.gradient_checkpointing=true",
]
PHASES = ("load", "rollout", "scoring", "optimise")
WITHIN = 0.15  # of what was measured
PROMPT = 64  # tokens


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=ppo_step.LIMITS, default="small")
    parser.add_argument("--batch", type=int, default=32, help="responses of an update")
    parser.add_argument("--limit", type=int, help="response tokens")
    text = "settings of each case, key=value,key=value (default: plain, LoRA, micro-batches, ...)"
    parser.add_argument("--cases", nargs="+", help=text)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    lora = ["peft.enabled=true", SHARED] if options.preset == "7b-lora" else None
    options.cases = options.cases or lora or CASES
    return options


def as_step(options: argparse.Namespace, case: str) -> argparse.Namespace:
    """The options of `ppo_step.py` for a case."""
    given = ["--preset", options.preset, "--sides", "ours", "--batch", str(options.batch)]
    given += ["--updates", "2", "--set", *case.split(",")] if case else ["--updates", "2"]
    if options.limit:
        given += ["--limit", str(options.limit)]
    step = ppo_step.parse(given)
    step.folder = options.folder
    return step


def write_adapter(folder: Path) -> None:
    """Write a reward model's adapter on the policy, which `ppo.share_base` reads."""
    from rlhf.config import ModelConfig, PeftConfig
    from rlhf.models import add_lora, load_policy, scalar_role, what_to_save
    from rlhf.tokenizer import load_tokenizer

    config, lora = ModelConfig(path=str(folder / "policy")), PeftConfig(enabled=True)
    model = scalar_role(load_policy(config, load_tokenizer(config)), config)
    write = what_to_save(add_lora(model, lora, "SEQ_CLS", seed=1), lora, config.path)[1]
    assert write is not None
    (folder / "reward/adapter").mkdir()
    write(folder / "reward/adapter")


# --- One case, in a process of its own ------------------------------------------------------------


class Peak:
    """Most MiB of tensors between two calls, counted as the file's docstring says."""

    def __init__(self) -> None:
        self.before = self.profile = None

    def start(self) -> None:
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        self.before = tensor_bytes()
        kinds = [torch.profiler.ProfilerActivity.CPU]
        self.profile = torch.profiler.profile(activities=kinds, profile_memory=True)
        self.profile.start()

    def stop(self) -> float:
        if DEVICE == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        self.profile.stop()
        events = [
            e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"
        ]
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        return (self.before + max(accumulate(changes, initial=0))) / 2**20


def tensor_bytes() -> int:
    """Bytes of all tensors that Python knows; outside of a backward pass there are no others."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    storages = [x.untyped_storage() for x in tensors if x.device.type == "cpu"]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def measure(options: argparse.Namespace) -> None:
    """Answer with MiB of each phase of the last update, and with the estimates."""
    import rlhf.ppo.rollout as rollout
    from rlhf import PPOTrainer
    from rlhf.distributed import make_accelerator
    from rlhf.ppo.actors import check_promises, load_actors, load_checked_tokenizer
    from rlhf.ppo.preflight.longest_step import longest_micro_batch, measure_step
    from rlhf.ppo.preflight.memory import estimate_memory
    from rlhf.ppo.stage import with_sources

    config = with_sources(ppo_step.our_config(as_step(options, options.cases[0])), None)
    tokenizer, _ = load_checked_tokenizer(config)
    accelerator = make_accelerator(config.precision)
    torch.ones(64, 64, device=DEVICE).mm(torch.ones(64, 64, device=DEVICE))  # libraries load
    peak, peaks = Peak(), {}
    peak.start()
    actors = load_actors(config, tokenizer, None, accelerator)
    check_promises(config, actors, accelerator)
    peaks["load"] = peak.stop()
    prompts = [
        {"prompt": tokenizer.decode(ids), "input_ids": (ids * PROMPT)[:PROMPT]}
        for ids in json.loads((options.folder / "prompts.json").read_text())
    ]
    trainer = PPOTrainer(config, actors, prompts, accelerator, options.folder)
    part = longest_micro_batch(trainer)
    estimate = estimate_memory(trainer, part)
    step = measure_step(trainer, part)
    trainer.step()  # makes Adam's states
    sample, collect = rollout.sample_and_score, trainer.collect

    def sampled(*arguments: Any, **more: Any) -> Any:
        result = sample(*arguments, **more)
        peaks["rollout"] = peak.stop()
        peak.start()
        return result

    def collected() -> Any:
        result = collect()
        peaks["scoring"] = peak.stop()
        peak.start()
        return result

    rollout.sample_and_score, trainer.collect = sampled, collected
    peak.start()
    trainer.step()
    peaks["optimise"] = peak.stop()
    kept = estimate.sum("weights", "adam")
    held = kept + estimate.sum("gradients")
    activations = max(model.activations for model in estimate.models.values())
    rollout_only = max(estimate.sampling, estimate.scoring)
    estimates = {"rollout": kept + rollout_only, "optimise": held + activations}
    answer(
        {
            "measured": {name: peaks[name] for name in PHASES},
            "estimate": {name: number / 2**20 for name, number in estimates.items()},
            "total_estimate": estimate.total / 2**20,
            "longest_step": None if step.rise is None else step.rise / 2**20,
        }
    )


# --- All cases ------------------------------------------------------------------------------------


def run_case(options: argparse.Namespace, case: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--preset", options.preset, "--batch", str(options.batch)]
    command += ["--limit", str(options.limit)] if options.limit else []
    command += ["--threads", str(options.threads), "--folder", str(folder), "--cases", case]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    worker = Worker(case or "plain", command, environment)
    found = worker.end()
    worst = max(found["measured"][name] for name in PHASES[1:])
    return found | {"case": case or "plain", "ratio": found["total_estimate"] / worst}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    if options.folder:
        return measure(options)
    limits = machine()
    print(describe(limits), flush=True)
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ppo_step.write_world(as_step(options, ""), folder)
        write_adapter(folder)
        for case in options.cases:
            results.append(run_case(options, case, folder))
            print(f"{results[-1]['case']}: {results[-1]['ratio']:.2f}", file=sys.stderr)
    rows = []
    for found in results:
        estimate, measured = found["estimate"], found["measured"]
        cells = [f"{measured['load']:,.0f}", f"{measured['scoring']:,.0f}"]
        for phase in ("rollout", "optimise"):
            cells[-1:-1] = [f"{measured[phase]:,.0f} / {estimate[phase]:,.0f}"]
        rows.append([found["case"], *cells, found["ratio"]])
    names = ["case", "load", "rollout", "optimise", "scoring", "estimate / measured"]
    print("MiB; measured / estimated\n")
    print(table(names, rows))
    wrong = [found["case"] for found in results if abs(found["ratio"] - 1) > WITHIN]
    low, high = (f(found["ratio"] for found in results) for f in (min, max))
    text = f"preflight estimate {low:.2f} to {high:.2f} of what was measured"
    print(f"\n{text}" + (f"; not within {WITHIN:.0%}: {', '.join(wrong)}" if wrong else ""))
    settings = {k: v for k, v in vars(options).items() if k != "folder"}
    print(json.dumps({"headline": text, "cases": results, "machine": limits, "settings": settings}))


if __name__ == "__main__":
    main()
