"""Over-optimisation made visible on the embedded demo world: `python -m rlhf.overoptimization`.

Draws the proxy (the reward model's score, which PPO maximises) and the gold score (the world's true
reward, which nothing trains on) against the square root of KL(policy || SFT): a curve per KL
coefficient of PPO over its updates, and one for best-of-n of the SFT policy, as Gao et al. 2022
(arXiv 2210.10760) do. Writes `overoptimization.png` and `.json` into the run's directory.

The SFT and reward stages are those of `run_name` (default `demo`), trained first where they are
missing; PPO runs are named `<run_name>-kl<coefficient>`. What is finished is used again, so that a
stopped command continues when it is given again. `kl_coefs=[0,0.15]` chooses the coefficients;
every other argument goes to the stages that know it, e.g. `seed=2` or `ppo.num_updates=40`.

The star of each curve is the update that `evaluation.select` chooses. By default that is the one
with the highest held-out proxy - kl_coef * KL; where kl_coef is 0, the price of KL is
`SELECT_KL_COEF` instead. Left out: fits of the curves, and best-of-n's true KL where samples
coincide (the formula is an upper bound then).
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.checkpoint import hash_weights, read_record
from rlhf.config import InputError, PPOStageConfig, ScorerConfig, load_config
from rlhf.console import quiet_libraries, say, table
from rlhf.demo.__main__ import argument, run_stage
from rlhf.metrics import read_jsonl
from rlhf.options import run_command

KL_COEFS = "[0,0.02,0.05,0.15,0.5]"
SELECT_KL_COEF = 0.15  # that of the demo recipe
NUM_SAMPLES = 128  # of the SFT policy for each held-out prompt
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
BEST_OF_N_KEY = 1 << 32  # names the random numbers; no PPO update or evaluation has this number
# Ours, and the metric's in the PPO stage.
FIGURES = {"kl": "eval_kl", "proxy": "eval_score", "gold": "eval_independent_score"}
PROXY_UNITS = {
    "none": "its own unit",
    "demo_mean_zero": "its own unit, 0 = demonstrations",
    "standardise": "standard deviations, 0 = demonstrations",
}

Point = dict[str, Any]
Curve = dict[str, Any]


@dataclass
class Options:
    """The command line."""

    kl_coefs: str = KL_COEFS
    """KL coefficients, one curve each."""
    overrides: list[str] = field(default_factory=list)
    """Every other argument goes to the stages that know it."""


def main(arguments: list[str]) -> int:
    """Train what is missing, measure, draw; return the exit status."""
    again = "interrupted; the same command continues"
    return run_command(str(__doc__), Options, run, arguments, again)


def run(options: Options) -> int:
    """Train what is missing, measure, draw; return the status of the stage that failed, or 0."""
    _require_matplotlib()
    coefs, arguments = parse_coefs(options.kl_coefs), options.overrides
    overrides = [a for a in arguments if not a.startswith("run_name=")]
    runs = Path(argument(arguments, "runs_dir", "runs"))
    folder = runs / argument(arguments, "run_name", "demo")
    status = _train(folder, coefs, overrides)
    if status:
        return status
    stages = [runs / ppo_run_name(folder, coef) / "ppo" for coef in coefs]
    config = load_config(PPOStageConfig, stages[0] / "final/config.yaml")
    config.model.trust_remote_code = "model.trust_remote_code=true" in overrides
    curves = [read_curve(stage) for stage in stages]
    prompts = read_prompts(stages[0])
    best = best_of_n_points(*sample_scores(config, prompts))
    result = {
        "num_prompts": len(prompts),
        "num_samples": NUM_SAMPLES,
        "scorer_normalize": config.scorer.normalize,
        "ppo": curves,
        "best_of_n": best,
    }
    file = folder / "overoptimization.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(result, file.with_suffix(".png"))
    say(closing_table(result))
    say(f"\nsaved {file.with_suffix('.png')} and {file}")
    return 0


def _require_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            "drawing needs the matplotlib package: pip install 'rlhf[plot]'"
        ) from error


def parse_coefs(text: str) -> list[float]:
    """Read `[0,0.05]` or `0,0.05` as KL coefficients.

    Raises:
        InputError: not distinct finite numbers >= 0.
    """
    try:
        coefs = sorted(float(part) for part in text.strip("[] ").split(","))
    except ValueError:
        coefs = []
    named = {f"{coef:g}" for coef in coefs}
    if not coefs or len(named) < len(coefs) or not all(0 <= c < math.inf for c in coefs):
        raise InputError(
            f"kl_coefs must be distinct finite numbers >= 0, e.g. kl_coefs={KL_COEFS}, got {text}"
        )
    return coefs


def ppo_run_name(run: Path, coef: float) -> str:
    """Name of the PPO run with a KL coefficient."""
    return f"{run.name}-kl{coef:g}"


# --- Training -----------------------------------------------------------------------------------


def _train(run: Path, coefs: list[float], overrides: list[str]) -> int:
    """Run the stages that are not finished; return the first exit status that is not 0."""
    for stage in ("sft", "reward"):
        if (run / stage / "final").is_dir():
            say(f"using {run / stage / 'final'}")
        elif status := run_stage(stage, ["resume=auto", *overrides, f"run_name={run.name}"]):
            return status
    for coef in coefs:
        wanted = [
            "evaluation.every=4",
            *([] if coef else [f"evaluation.select_kl_coef={SELECT_KL_COEF}"]),
            *overrides,
            f"run_name={ppo_run_name(run, coef)}",
            f"model.path={run / 'sft/final'}",
            f"scorer.path={run / 'reward/final'}",
            f"ppo.kl_coef={coef:g}",
        ]
        final = run.with_name(ppo_run_name(run, coef)) / "ppo/final"
        if final.is_dir() and "overwrite=true" not in overrides:
            _check_finished(final, run / "sft/final", wanted)
            say(f"using {final}")
        elif status := run_stage("ppo", ["resume=auto", "preflight=false", *wanted]):
            return status
    return 0


def _check_finished(final: Path, sft: Path, wanted: list[str]) -> None:
    """Check that a finished PPO run is the one that the overrides ask for.

    Raises:
        InputError: it started from another policy, or was made with another value.
    """
    from omegaconf import OmegaConf

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


def read_curve(stage: Path) -> Curve:
    """Read the evaluations of a finished PPO run.

    Returns:
        `kl_coef`, `select`, `select_kl_coef`, `chosen` (the update in `final/`), `path`, and
        `points`: `update` with `kl`, `proxy`, `gold` (each with `_low` and `_high`, the ends of the
        95 % bootstrap interval over prompts) of every evaluation.

    Raises:
        InputError: it was not evaluated by a second scorer.
    """
    config = load_config(PPOStageConfig, stage / "final/config.yaml")
    record = read_record(stage / "final")
    points = []
    for row in read_jsonl(stage / "metrics.jsonl"):
        if FIGURES["gold"] in row:
            point = {"update": row["step"]}
            for name, metric in FIGURES.items():
                point |= {name + end: row[metric + end] for end in ("", "_low", "_high")}
            points.append(point)
    if record is None or not points:
        raise InputError(
            f"{stage} holds no evaluation by a second scorer; it needs evaluation.scorer and "
            "evaluation.num_prompts > 0"
        )
    select_kl_coef = config.evaluation.select_kl_coef
    return {
        "kl_coef": config.ppo.kl_coef,
        "select": config.evaluation.select,
        "select_kl_coef": config.ppo.kl_coef if select_kl_coef is None else select_kl_coef,
        "chosen": record.metrics["update"],
        "path": str(stage),
        "points": points,
    }


def read_prompts(stage: Path) -> list[Any]:
    """The held-out prompts that a PPO run was evaluated on."""
    return [row["prompt"] for row in read_jsonl(stage / "samples.jsonl") if row["step"] == 0]


def sample_scores(
    config: PPOStageConfig, prompts: list[Any], num_samples: int = NUM_SAMPLES
) -> tuple[Any, Any]:
    """Sample the SFT policy as PPO does before its first update, and score the answers.

    Args:
        config: of a PPO run; `model.path` names the SFT policy.

    Returns:
        Proxy and gold score, (len(prompts), num_samples) float32 each.
    """
    import torch

    from rlhf.data import encode_prompt
    from rlhf.distributed import default_device
    from rlhf.models import load_policy
    from rlhf.ppo.rollout import Actors, CollectSettings, score_sampled
    from rlhf.sampling import generate, sampling_for, uniform_noise
    from rlhf.scorers import checked_scores, load_scorer
    from rlhf.tokenizer import hash_rendering, load_tokenizer, response_text

    quiet_libraries()
    say(f"\nbest-of-n: {num_samples} samples of the SFT policy to each of {len(prompts)} prompts")
    device = torch.device(default_device())
    ppo, code = config.ppo, config.model.trust_remote_code
    scorer = load_scorer(config.scorer, device, trust_remote_code=code)
    tokenizer = load_tokenizer(config.model)
    policy: Any = load_policy(config.model, tokenizer)
    sampling = sampling_for(policy, tokenizer, ppo.response_length, ppo.temperature)
    encoded = [{"prompt": p, "input_ids": encode_prompt(p, tokenizer)} for p in prompts]
    rows = [row for row in encoded for _ in range(num_samples)]
    noise = uniform_noise((config.seed, BEST_OF_N_KEY), range(len(rows)), ppo.response_length)
    ids = [row["input_ids"] for row in rows]
    sampled = generate(policy.to(device), ids, sampling, noise, batch_size=256)
    actors = Actors(policy, None, None, scorer, tokenizer, hash_rendering(tokenizer))
    settings = CollectSettings(
        sampling, ppo.missing_eos_penalty, ppo.rollout_batch_size, ppo.micro_batch_size
    )
    proxy = score_sampled(actors, rows, sampled.ids, sampled.finished, settings).total
    judge = ScorerConfig(path=config.evaluation.scorer, normalize="none")
    gold = checked_scores(
        load_scorer(judge, device, field="evaluation.scorer", trust_remote_code=code),
        [row["prompt"] for row in rows],
        [response_text(i, tokenizer, r["prompt"]) for i, r in zip(sampled.ids, rows, strict=True)],
        "evaluation.scorer",
    )
    return proxy.view(-1, num_samples), gold.view(-1, num_samples)


def best_of_n_points(proxy: Any, gold: Any) -> list[Point]:
    """What choosing the best of n samples by the proxy gives, for n = 1, 2, 4, ...

    Args:
        proxy, gold: (P, N) scores of N samples to each of P prompts; n is at most N.

    Returns:
        `n` with `kl`, `proxy`, `gold`, the latter two with `_low` and `_high`, the ends of the 95 %
        bootstrap interval over prompts.
    """
    from rlhf.functional import best_of_n, best_of_n_kl, bootstrap_interval

    points = []
    for n in (n for n in BEST_OF if n <= proxy.shape[1]):
        point: Point = {"n": n, "kl": best_of_n_kl(n)}
        for name, scores in (("proxy", best_of_n(proxy, n)), ("gold", best_of_n(proxy, n, gold))):
            low, high = bootstrap_interval(scores)
            point |= {name: float(scores.mean()), f"{name}_low": low, f"{name}_high": high}
        points.append(point)
    return points


# --- Showing ------------------------------------------------------------------------------------


def peak_of(curve: Curve) -> Point:
    """The evaluation with the highest gold score."""
    return max(curve["points"], key=lambda point: point["gold"])


def chosen_of(curve: Curve) -> Point:
    """The evaluation of the update that became `final/`."""
    return next(point for point in curve["points"] if point["update"] == curve["chosen"])


def closing_table(result: dict[str, Any]) -> str:
    """Summarise the curves, one row per KL coefficient and one for the largest n."""
    header = [*("kl_coef", "gold: peak", "at update", "gold: end", "proxy: end", "KL: end, nats")]
    header += ["chosen update", "its gold"]
    rows: list[tuple[Any, ...]] = []
    for curve in result["ppo"]:
        peak, end, chosen = peak_of(curve), curve["points"][-1], chosen_of(curve)
        row = f"{curve['kl_coef']:g}", peak["gold"], peak["update"], end["gold"], end["proxy"]
        rows.append((*row, end["kl"], chosen["update"], chosen["gold"]))
    best = result["best_of_n"]
    peak, end = peak_of({"points": best}), best[-1]
    name = f"best of {end['n']}"
    rows.append((name, peak["gold"], None, end["gold"], end["proxy"], end["kl"], None, None))
    return "\n" + table(rows, header)


def title_of(curves: list[Curve]) -> str:
    """State what the curve with the smallest KL coefficient shows, if the intervals bear it out."""
    peak, end = peak_of(curves[0]), curves[0]["points"][-1]
    if not (end["gold_high"] < peak["gold_low"] and end["proxy_low"] > peak["proxy_high"]):
        return "Reward model's score and true score against the distance from the SFT policy"
    coef = curves[0]["kl_coef"]
    without = f"With kl_coef = {coef:g}" if coef else "Without a KL penalty"
    return (
        f"{without} the reward model's score keeps rising,\n"
        f"but the true score falls from {peak['gold']:.2f} to {end['gold']:.2f}"
    )


def footnote_of(result: dict[str, Any]) -> str:
    """Say what the marks and bars mean."""
    rules = {curve["select"] for curve in result["ppo"]}
    star = f"the update of evaluation.select = {', '.join(sorted(rules))}"
    if rules == {"score_minus_kl"}:
        star = "the update with the highest held-out proxy - kl_coef x KL"
        for curve in result["ppo"]:
            if curve["select_kl_coef"] != curve["kl_coef"]:
                star += f" ({curve['select_kl_coef']:g} x KL for kl_coef = {curve['kl_coef']:g})"
    bars = f"95 % bootstrap intervals over {result['num_prompts']} held-out prompts"
    return f"Star: {star}.  Square: the last update.\nBars: {bars}."


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw proxy and gold side by side over the square root of KL; write a PNG."""
    from matplotlib.figure import Figure
    from PIL import Image

    curves, best = result["ppo"], result["best_of_n"]
    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    unit = PROXY_UNITS[result["scorer_normalize"]]
    names = {
        "proxy": ("Proxy: what PPO maximises", f"reward model's score,\n{unit}"),
        "gold": ("Gold: what nothing trains on", "true score, 0 to 1"),
    }
    for panel, (name, (title, label)) in zip(panels, names.items(), strict=True):
        for number, curve in enumerate(curves):
            points, label_ppo = curve["points"], f"PPO, kl_coef = {curve['kl_coef']:g}"
            color = f"C{number}"
            _line(panel, points, name, color=color, label=label_ppo)
            _mark(panel, points[-1], name, marker="s", color=color, markersize=6)
            _mark(panel, chosen_of(curve), name, marker="*", color=color, markersize=15)
        label_best = f"best of n = 1 ... {best[-1]['n']} (SFT)"
        _line(panel, best, name, color="black", linestyle="--", label=label_best)
        panel.set_title(title, fontsize=11)
        panel.set_ylabel(label)
        panel.set_xlabel("square root of KL(policy || SFT), √nats per response")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title_of(curves), fontsize=13, fontweight="bold")
    figure.supxlabel(footnote_of(result), fontsize=9)
    panels[0].legend(loc="lower right", fontsize=9)
    figure.savefig(file)
    with Image.open(file) as image:  # 128 colours do, at a third of the size
        image.convert("RGB").quantize(128).save(file, optimize=True)


def _line(panel: Any, points: list[Point], name: str, **style: Any) -> None:
    x = [_root(point) for point in points]
    panel.plot(x, [p[name] for p in points], marker=".", markersize=4, linewidth=1.5, **style)
    bars = [[p[f"{name}_low"] for p in points], [p[f"{name}_high"] for p in points]]
    panel.vlines(x, *bars, color=style["color"], alpha=0.3, linewidth=1)


def _mark(panel: Any, point: Point, name: str, **style: Any) -> None:
    panel.plot(_root(point), point[name], markeredgecolor="white", zorder=5, **style)


def _root(point: Point) -> float:
    return math.sqrt(max(point["kl"], 0.0))  # an estimate of a KL near 0 may be negative


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
