"""Recorded numbers: the table of metric names, `metrics.jsonl`, `timings.jsonl`, Weights & Biases.

`METRICS` lists every name that a stage may write, with its meaning and unit; any other name is an
error. Equal runs write equal bytes to `metrics.jsonl`, so wall-clock times, and what a judge's file
of answers saves, go to `timings.jsonl`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import InputError, StageConfig, one_line, show
from rlhf.console import is_main_process
from rlhf.trackers import Trackers

TIMINGS = frozenset({"seconds", "tokens_per_second", "collect_seconds", "optimize_seconds"})
# what is asked depends on the answers that were kept before, and on failures of a server
_ASKED = "judge_asked judge_known judge_tokens judge_cost remote_requests remote_retries".split()
ASKED = frozenset([*_ASKED, *(f"eval_{name}" for name in _ASKED)])
METRICS: dict[str, str] = {
    # all stages
    "step": "optimiser steps (sft, reward) or PPO updates finished",
    "seconds": "wall-clock time since the stage began, seconds",
    "epoch": "passes over the training rows",
    "loss": "training loss; nats per labelled token (sft), nats per prompt (reward)",
    "learning_rate": "learning rate of the policy, or of the only model",
    "grad_norm": "gradient norm before clipping, of the policy or of the only model",
    # sft
    "mean_token_accuracy": "share of labelled tokens that are the arg max",
    "entropy": "mean entropy of the policy's next-token distribution, nats per token",
    "num_tokens": "tokens seen by training so far",
    "eos_rate": "share of sampled responses that end with a stop token",
    # reward
    "accuracy": "share of non-tied pairs ranked right (a tied score counts one half)",
    "margin": "mean score of the better response minus that of the worse",
    "eval_longer_wins_accuracy": "accuracy of `the longer response wins` on the same pairs",
    "eval_length_matched_accuracy": "accuracy on pairs of similar lengths in tokens (ratio >= 0.8)",
    "eval_num_pairs": "number of non-tied held-out pairs",
    "eval_num_length_matched_pairs": "number of those with similar lengths",
    # ppo, of the rollout (before its optimiser steps)
    "score": "mean score of a response, after normalisation and the penalty for a missing EOS "
    "(under ppo.whiten_scores before both the whitening and the penalty)",
    "score/": "score/<component>: its mean score, without its weight and the penalty",
    "gated_rate": "share of responses that a component with a gate scored alone",
    "cut_rate": "share of responses that a reward model with another tokenizer had to cut",
    "score_std": "standard deviation of the scores over the rollout",
    "finished_score": "mean score of the responses that end with a stop token",
    "reward": "mean over sequences of score minus KL penalty",
    "kl": "mean KL(policy || reference), k1 estimate summed over tokens, nats per sequence",
    "kl_k3": "the same by the k3 estimate, never negative, nats per sequence",
    "kl_std": "standard deviation of the k1 estimate over sequences, nats per sequence",
    "kl_coef": "coefficient of the KL penalty",
    "response_length": "mean number of response tokens, EOS included",
    "response_length_max": "longest response, tokens",
    "sampler_gap": "largest |log-prob of the sampler - of the training forward|, nats per token",
    "sampler_gap_mean": "mean of that difference over response tokens",
    "sampler_gap_p999": "its 99.9th percentile over response tokens",
    "value": "mean predicted value over response tokens",
    "return": "mean return over response tokens",
    "explained_variance": "1 - Var(return - value) / Var(return), over response tokens",
    "critic_steers": "1 if the advantages of this update used the critic, 0 if it ex"
    "plained nothing (critic.must_explain)",
    "advantage_std": "standard deviation of the advantages before whitening",
    "judge_unreadable": "judgements without a verdict, which count as the lowest score",
    "judge_asked": "answers that a judge gave; in timings.jsonl, as the next five",
    "judge_known": "answers of a judge that its file had, so that it was not asked",
    "judge_tokens": "tokens that the judge read and wrote for these, as it says",
    "judge_cost": "their cost by scorer.endpoint.prices",
    "remote_requests": "requests to remote scorers",
    "remote_retries": "further tries of requests that failed",
    # ppo, of the optimiser steps
    "policy_loss": "clipped surrogate loss, mean over response tokens and steps",
    "value_loss": "value loss (half the squared error), mean over response tokens and steps",
    "approx_kl": "mean of ratio - 1 - log ratio between old and new policy, nats per token",
    "clip_fraction": "share of tokens whose gradient the clipping of the ratio removed",
    "value_clip_fraction": "share of tokens whose clipped value error is the larger",
    "dual_clip_fraction": "share of tokens held by ppo.dual_clip",
    "ratio": "mean probability ratio between new and old policy",
    "ratio_max": "largest ratio at any token of the update",
    "ratio_min": "smallest ratio at any token of the update",
    "importance_weight": "mean weight of ppo.importance_correction over response tokens",
    "ptx_loss": "loss on the PPO-ptx texts, nats per token",
    "first_ratio_deviation": "largest |ratio - 1| in the first minibatch, which must be 0",
    "critic_grad_norm": "gradient norm of the critic before clipping",
    "critic_learning_rate": "learning rate of the critic",
    "optimizer_steps": "optimiser steps made in this update",
    "skipped_minibatches": "minibatches of this update that had no finished response",
    "abandoned_epochs": "PPO epochs skipped in this update because approx_kl passed target_kl",
    "tokens_per_second": "response tokens of the rollout over the seconds of the whole update",
    "collect_seconds": "sampling, log-probs, values and scores, seconds",
    "optimize_seconds": "optimiser steps, seconds",
    # ppo, held-out prompts
    "eval_score/": "eval_score/<component>: that component's mean score on held-out prompts",
    "eval_independent_score": "mean score by evaluation.scorer, which PPO does not train on",
    "eval_win_rate": "share of held-out prompts whose answer beats the one before training, by "
    "evaluation.scorer or else the training scorer (a tie counts one half; the same answer is one)",
}
_HELD_OUT = (
    """loss mean_token_accuracy entropy num_tokens accuracy margin score kl response_length
    eos_rate cut_rate judge_unreadable""".split()
    + _ASKED
)
METRICS |= {f"eval_{name}": f"{name} on held-out rows or prompts" for name in _HELD_OUT}
METRICS |= {
    f"eval_{name}_{side}": f"{side} end of the 95 % bootstrap interval of eval_{name}"
    for name in "score kl response_length eos_rate independent_score win_rate".split()
    for side in ("low", "high")
}


class MetricsWriter:
    """Appends one JSON object per step to `metrics.jsonl` and `timings.jsonl`, and to the trackers.

    Only the main process writes. The x-axis is our own step, so a resumed run continues its curves;
    `checkpoint_to_resume` drops what was written after the checkpoint.
    """

    def __init__(self, directory: Path, config: StageConfig, stage: str, run_id: str | None = None):
        """Start or continue the run in the trackers."""
        self._directory = directory
        self._trackers: Trackers | None = None
        self._last: dict[str, dict[str, Any]] = {}  # file -> its last row
        if is_main_process():
            for name in ("metrics.jsonl", "timings.jsonl"):
                self._last[name] = (read_jsonl(directory / name) or [{"step": -1}])[-1]
            next_step = self._last["metrics.jsonl"]["step"] + 1
            self._trackers = Trackers(directory, config, stage, run_id, next_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write metrics of a step; those of the same step, such as an evaluation, join its row.

        Raises:
            KeyError: neither the name nor its part up to the slash is in `METRICS`.
        """
        # score/helpful belongs to score/
        known = [n for n in values if METRICS.keys() & {n, n.partition("/")[0] + "/"}]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise KeyError(f"metrics without an entry in METRICS: {unknown}")
        if self._trackers is None:
            return
        row = {name: _json_value(value) for name, value in values.items() if name != "step"}
        for file, is_timing in (("metrics.jsonl", False), ("timings.jsonl", True)):
            may_differ = TIMINGS | ASKED
            kept = {name: row[name] for name in row if (name in may_differ) == is_timing}
            if kept:
                self._write(file, step, kept)
        self._trackers.log(step, row)

    def _write(self, file: str, step: int, values: dict[str, Any]) -> None:
        last = self._last[file]
        if last["step"] != step:
            self._last[file] = {"step": step} | values
            append_jsonl(self._directory / file, [self._last[file]])
            return
        new = {name: value for name, value in values.items() if name not in last}
        if new:
            last |= new
            extend_last_row(self._directory / file, new)

    def write_samples(self, step: int, path: Path, samples: list[dict[str, Any]]) -> None:
        """Append sampled responses to a JSONL file, and log them as a table."""
        if self._trackers is None:
            return
        append_jsonl(path, samples)
        self._trackers.log_samples(step, samples)

    def close(self) -> None:
        """Finish the run in the trackers."""
        if self._trackers is not None:
            self._trackers.close()


class MetricsRows(list[dict[str, Any]]):
    """Rows of `metrics.jsonl`; a name, as in `rows["eval_loss"]`, gives the figure of `final/`."""

    def __init__(self, rows: list[dict[str, Any]], after: dict[str, float]):
        super().__init__(rows)
        self.after = after

    def __getitem__(self, key: Any) -> Any:
        return self.after[key] if isinstance(key, str) else super().__getitem__(key)


@dataclass(repr=False)
class StageResult:
    """What a stage returns; printed, it is the table that its command ends with.

    Attributes:
        directory: `final/`, ready for the next stages; None if training was interrupted.
        after: metrics on held-out rows, of the model in `directory`.
        table: these as text.
        stage_dir: the folder of the stage; None if nothing was written.
        stopped_by: number of the signal that interrupted training; None if none did.
    """

    directory: Path | None
    after: dict[str, float]
    table: str = ""
    stage_dir: Path | None = None
    stopped_by: int | None = None

    @property
    def metrics(self) -> MetricsRows:
        """The rows of `metrics.jsonl`: a dict for each row, in the order of their `step`."""
        rows = [] if self.stage_dir is None else read_jsonl(self.stage_dir / "metrics.jsonl")
        return MetricsRows(rows, self.after)

    def __repr__(self) -> str:
        return self.table or f"{type(self).__name__}: no figures of held-out rows"


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a JSONL file; non-finite numbers, which JSON lacks, become null."""
    with path.open("a", encoding="utf-8") as stream:
        for row in rows:
            text = json.dumps(_json_value(row), ensure_ascii=False, allow_nan=False)
            stream.write(text + "\n")


def extend_last_row(path: Path, values: dict[str, Any]) -> None:
    """Add values to the last row of a JSONL file. The row keeps its beginning, so that
    `cut_jsonl` can take them back."""
    text = json.dumps(_json_value(values), ensure_ascii=False, allow_nan=False)
    with path.open("r+b") as stream:
        stream.seek(-len(b"}\n"), os.SEEK_END)
        stream.write(f", {text[1:]}\n".encode())


def cut_jsonl(path: Path, size: int) -> None:
    """Cut a JSONL file back to a size that it had, also where its last row was extended since."""
    os.truncate(path, size)
    if size:
        with path.open("r+b") as stream:
            stream.seek(-len(b"}\n"), os.SEEK_END)
            stream.write(b"}\n")


def read_jsonl(path: Path, *needs: str) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file; none if there is no file.

    A last line that is being written is left out.

    Args:
        needs: keys that every row has.

    Raises:
        InputError: a line is not a row, or has not these keys.
    """
    # bytes, because splitlines() of text would also split at separators inside a response
    data = path.read_bytes() if path.is_file() else b""
    lines, rows = data.splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_object(line))
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not data.endswith(b"\n"):
                break
            raise InputError(f"{path} is damaged: line {number}: {one_line(error)}") from error
        for name in needs:
            if name not in rows[-1]:
                raise InputError(f"{path} is damaged: line {number} has no {name}")
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """Read a file with one JSON object.

    Raises:
        InputError: it holds something else.
    """
    try:
        return _object(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        fix = "delete it, or let its command write it again"
        raise InputError(f"{path} is damaged: {one_line(error)}; {fix}") from error


def _object(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"got {show(value)}, expected an object with named fields")
    return value


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
