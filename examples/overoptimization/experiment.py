"""Over-optimisation made visible on the embedded demo world.

Draws the proxy (the reward model's score, which PPO maximises) and the gold score (the world's true
reward, which nothing trains on) against the square root of KL(policy || SFT), as Gao et al. 2022
(arXiv 2210.10760) do. There is a curve over the updates of PPO for each KL coefficient, and one for
best-of-n of the SFT policy. Writes `overoptimization.png` and `.json` into the run's directory.

The SFT and reward stages of the run `demo` (or `run_name=`) are trained first if they are missing.
PPO runs are named `<run_name>-kl<coefficient>`. Finished stages are used again, so a stopped
command continues when it is given again. Overrides go to the stages that know them, e.g. `seed=2`
or `ppo.num_updates=40`.

The star of each curve is the update that `evaluation.select` chooses: by default the one with the
highest held-out proxy - kl_coef * KL. For kl_coef = 0, the price of KL is `SELECT_KL_COEF` instead.

Run: python examples/overoptimization/experiment.py
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.config import InputError, PPOStageConfig, load_config
from rlhf.console import say
from rlhf.curves import plot_hint
from rlhf.option_parser import run_command
from rlhf.pipeline import route, run_stage

KL_COEFS = [0.0, 0.02, 0.05, 0.15, 0.5]
SELECT_KL_COEF = 0.15  # that of the demo recipe


@dataclass
class Options:
    """The command line."""

    kl_coefs: list[float] = field(default_factory=lambda: list(KL_COEFS))
    """KL coefficients, one curve each (default: [0,0.02,0.05,0.15,0.5])."""
    run_name: str = "demo"
    """Run of the SFT and reward stages; beginning of the names of the PPO runs."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of the stages."""


def main(arguments: list[str]) -> int:
    """Train what is missing, measure, draw; return the exit status."""
    again = "interrupted; the same command continues"
    return run_command(str(__doc__), Options, experiment, arguments, again)


def experiment(options: Options) -> int:
    """Train what is missing, measure, draw; return the status of the stage that failed, or 0."""
    if hint := plot_hint("overoptimization.png"):
        raise InputError(hint)
    coefs = check_coefs(options.kl_coefs)
    if status := _train(options, coefs):
        return status
    from curves import NUM_SAMPLES, best_of_n_points, read_curve, read_prompts, sample_scores
    from picture import closing_table, draw

    folder = Path(options.runs_dir) / options.run_name
    stages = [_ppo_run(folder, coef) / "ppo" for coef in coefs]
    config = load_config(PPOStageConfig, stages[0] / "final/config.yaml")
    config.model.trust_remote_code = "model.trust_remote_code=true" in options.overrides
    prompts = read_prompts(stages[0])
    result = {
        "num_prompts": len(prompts),
        "num_samples": NUM_SAMPLES,
        "scorer_normalize": config.scorer.normalize,
        "ppo": [read_curve(stage) for stage in stages],
        "best_of_n": best_of_n_points(*sample_scores(config, prompts)),
    }
    file = folder / "overoptimization.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(result, file.with_suffix(".png"))
    say(closing_table(result))
    say(f"\nsaved {file.with_suffix('.png')} and {file}")
    return 0


def check_coefs(coefs: list[float]) -> list[float]:
    """Check KL coefficients, and sort them.

    Raises:
        InputError: not distinct finite numbers >= 0.
    """
    named = {f"{coef:g}" for coef in coefs}
    if not coefs or len(named) < len(coefs) or not all(0 <= c < math.inf for c in coefs):
        raise InputError(
            f"kl_coefs must be distinct finite numbers >= 0, e.g. kl_coefs=[0,0.15], got {coefs}"
        )
    return sorted(coefs)


def _ppo_run(folder: Path, coef: float) -> Path:
    return folder.with_name(f"{folder.name}-kl{coef:g}")


def _train(options: Options, coefs: list[float]) -> int:
    """Run the stages that are not finished; return the first exit status that is not 0."""
    folder = Path(options.runs_dir) / options.run_name
    overrides = ["recipe=demo", *options.overrides, f"runs_dir={options.runs_dir}"]
    for stage in ("sft", "reward"):
        if (folder / stage / "final").is_dir():
            say(f"using {folder / stage / 'final'}")
            continue
        mine = [*route(overrides, ["sft", "reward"])[stage], f"run_name={folder.name}"]
        if status := run_stage(stage, ["resume=auto", *mine]):
            return status
    for coef in coefs:
        run = _ppo_run(folder, coef)
        wanted = [
            "evaluation.every=4",
            *([] if coef else [f"evaluation.select_kl_coef={SELECT_KL_COEF}"]),
            *route(overrides, ["ppo"])["ppo"],
            f"run_name={run.name}",
            f"model.path={folder / 'sft/final'}",
            f"scorer.path={folder / 'reward/final'}",
            f"ppo.kl_coef={coef:g}",
        ]
        if (run / "ppo/final").is_dir() and "overwrite=true" not in wanted:
            _check_finished(run / "ppo/final", folder / "sft/final", wanted)
            say(f"using {run / 'ppo/final'}")
        elif status := run_stage("ppo", ["resume=auto", "preflight=false", *wanted]):
            return status
    return 0


def _check_finished(final: Path, sft: Path, wanted: list[str]) -> None:
    """Check that a finished PPO run is the one that the overrides ask for.

    Raises:
        InputError: it started from another policy, or was made with another value.
    """
    from omegaconf import OmegaConf

    from rlhf.checkpoint import hash_weights, read_record

    fix = "give another run_name, or overwrite=true to train again"
    record = read_record(final)
    if record is None or record.parent_weights != hash_weights(sft):
        raise InputError(f"{final} was not trained from {sft} as it is now; {fix}")
    used, asked = OmegaConf.load(final / "config.yaml"), OmegaConf.from_dotlist(wanted)
    for key in (override.partition("=")[0] for override in wanted):
        theirs, ours = OmegaConf.select(used, key), OmegaConf.select(asked, key)
        # a group such as peft=lora is not spelt out in the configuration that it made
        if not OmegaConf.is_config(theirs) and theirs is not None and theirs != ours:
            raise InputError(f"{final} was trained with {key}={theirs}, not {ours}; {fix}")


# --- Measuring ----------------------------------------------------------------------------------


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
