"""The table and the picture of the over-optimisation experiment."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from curves import Curve, Point, chosen_of, peak_of

from rlhf.console import table

PROXY_UNITS = {
    "none": "its own unit",
    "demo_mean_zero": "its own unit, 0 = demonstrations",
    "standardise": "standard deviations, 0 = demonstrations",
}


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
