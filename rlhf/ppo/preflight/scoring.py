"""The scorer on the policy's samples: is it a score, of the response alone, and worth following?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf.config import InputError
from rlhf.console import interval_text, table
from rlhf.functional import best_of_n, best_of_n_kl, bootstrap_interval, final_scores
from rlhf.models import use_bfloat16
from rlhf.ppo.preflight.findings import FAIL, OK, WARN, Finding
from rlhf.ppo.preflight.samples import NUM_SAMPLES, Samples
from rlhf.ppo.rollout import score_sampled
from rlhf.ppo.trainer import PPOTrainer
from rlhf.scorers import Scorer, Scores

LENGTH_DRIVEN = 0.8  # correlation of score and length beyond which the score is the length


def examine_scoring(
    trainer: PPOTrainer, samples: Samples, independent: Scorer | None
) -> list[Finding]:
    """Examine the scorer on the samples, on the main process."""
    watchdog, ppo = trainer.config.watchdog, trainer.config.ppo
    finished, lengths = samples.rollout.finished.cpu(), samples.rollout.lengths.cpu()
    rows, least_std = range(len(samples.ids)), watchdog.score_std or 0.0
    tolerance = 1e-2 if use_bfloat16(trainer.config.precision) else 1e-4

    def total_of(rows: Sequence[int]) -> Tensor:
        return _score(trainer, samples, rows, trainer.actors.scorer, "the scorer").total

    try:
        scores = _score(trainer, samples, rows, trainer.actors.scorer, "the scorer")
        finding = examine_scorer(total_of, scores.total, lengths, least_std, tolerance)
    except InputError as error:
        return [Finding("scorer", FAIL, str(error), "correct the scorer, or its input")]
    if finding.status == FAIL:
        return [finding]
    findings = [finding, examine_length(scores.total, lengths)]
    penalty = ppo.missing_eos_penalty
    whitened = torch.ones_like(finished) if ppo.whiten_scores else None
    total = final_scores(scores.total, finished, penalty, scores.dense_total, whitened)
    if penalty is not None:
        findings.append(examine_penalty(total[finished], penalty))
    judged = None
    try:
        if independent is not None:
            judged = _score(trainer, samples, rows, independent, "evaluation.scorer").total
            judged = judged.view(-1, NUM_SAMPLES)
    except InputError as error:
        fix = "correct it, or set evaluation.scorer=null"
        return [*findings, Finding("best of n", FAIL, str(error), fix)]
    return [*findings, examine_best_of_n(total.view(-1, NUM_SAMPLES), judged, least_std)]


def _score(
    trainer: PPOTrainer, samples: Samples, rows: Sequence[int], scorer: Scorer, field: str
) -> Scores:
    """Score some of the samples, without a penalty for a missing EOS."""
    prompts, ids = [samples.prompts[row] for row in rows], [samples.ids[row] for row in rows]
    with trainer.accelerator.autocast():  # as in `collect`
        return score_sampled(trainer.actors, prompts, ids, scorer, field)


def examine_scorer(
    score: Callable[[Sequence[int]], Tensor],
    scores: Tensor,
    lengths: Tensor,
    least_std: float,
    tolerance: float,
) -> Finding:
    """Examine whether scores differ between responses, and depend on nothing but the response.

    Args:
        score: row numbers -> (len(rows),) scores.
        scores: (N,) of all rows.
        lengths: (N,) tokens. The shortest responses are scored alone, and in a batch with the
            longest, which pads them most.
        least_std: standard deviation that counts as constant.
        tolerance: difference that counts as rounding; differences are in standard deviations.
    """
    name, std = "scorer", float(scores.std(unbiased=False))
    text = f"mean score {float(scores.mean()):.3g}, standard deviation {std:.3g}"
    if std <= least_std:
        fix = "correct the scorer; if no response deserves more yet, train the SFT stage further"
        return Finding(name, FAIL, f"{text}: a constant, there is nothing to learn", fix)
    order = lengths.argsort(stable=True).tolist()
    short, rows = order[:4], order[:4] + order[-4:]
    together = score(rows)
    noise = float((score(rows) - together).abs().max()) / std
    if noise > tolerance:
        text += f"; the same batch, scored twice, differs by {noise:.1g}"
        fix = "make the scorer deterministic, or raise ppo.batch_size: noise slows PPO down"
        return Finding(name, WARN, text, fix)
    alone = torch.cat([score([row]) for row in short])
    leak = float((alone - together[: len(short)]).abs().max()) / std
    text += f"; alone or in a batch it differs by {leak:.1g}"
    if leak <= tolerance:
        return Finding(name, OK, text)
    text += ": a score depends on the other responses of its batch"
    fix = "check the padding and attention mask of the scorer; scorer.batch_size=1 avoids it"
    return Finding(name, FAIL if leak > 0.1 else WARN, text, fix)


def examine_length(scores: Tensor, lengths: Tensor) -> Finding:
    """Examine whether scores are only the length of the response."""
    if len(lengths.unique()) == 1:
        return Finding("length", OK, "every response has the same length")
    correlation = float(torch.corrcoef(torch.stack([scores.double(), lengths.double()]))[0, 1])
    text = f"correlation of score and response length {correlation:.2f}"
    if abs(correlation) <= LENGTH_DRIVEN:
        return Finding("length", OK, text)
    text += f": PPO would learn to write {'more' if correlation > 0 else 'less'}"
    fix = "see the reward stage's length-matched accuracy, and add comparisons of equal length"
    return Finding("length", WARN, text, fix)


def examine_penalty(finished_scores: Tensor, penalty: float) -> Finding:
    """Examine whether it pays to end a response."""
    name = "missing EOS"
    if not len(finished_scores):
        return Finding(name, OK, "no response ends: see `stop token`")
    mean = float(finished_scores.mean())
    text = f"responses that end score {mean:.3g}, those that do not {penalty:g}"
    if mean > penalty:
        return Finding(name, OK, text)
    fix = "lower ppo.missing_eos_penalty, or set scorer.normalize=standardise"
    return Finding(name, WARN, f"{text}: not ending pays", fix)


def examine_best_of_n(scores: Tensor, judged: Tensor | None, least_std: float) -> Finding:
    """Examine what the scorer's best of n responses is worth: PPO can hope for about as much.

    Args:
        scores: (P, N) of the scorer, N responses to each prompt, N >= 4.
        judged: (P, N) of the independent scorer.
        least_std: mean standard deviation within a prompt that leaves nothing to choose from.
    """
    name, most = "best of n", scores.shape[1]
    counts = (1, 4, most)
    rows = [("scorer", *(_with_interval(best_of_n(scores, n)) for n in counts))]
    if judged is not None:
        values = (_with_interval(best_of_n(scores, n, judged)) for n in counts)
        rows.append(("evaluation.scorer", *values))
    details = table(rows, ("best of", *map(str, counts)))
    std = float(scores.std(dim=1, unbiased=False).mean())
    if std <= least_std:
        text = (
            f"the responses to one prompt score alike (standard deviation {std:.2g}): nothing to "
            "choose from"
        )
        fix = "raise ppo.temperature, or train the SFT stage on more varied responses"
        return Finding(name, WARN, text, fix, details)
    hope = f"PPO can hope for about the best of {most} ({best_of_n_kl(most):.1f} nats of KL)"
    if judged is None:
        return Finding(name, OK, f"{hope}, by the scorer that it trains on", "", details)
    gain = best_of_n(scores, most, judged) - best_of_n(scores, 1, judged)
    worth = f"{_with_interval(gain, sign='+')} by evaluation.scorer"
    if bootstrap_interval(gain)[0] > 0:
        return Finding(name, OK, f"{hope}: {worth}", "", details)
    text = f"the best of {most} by the scorer is not clearly better than one response: {worth}"
    fix = "the reward model is at fault and PPO cannot help: give it more or cleaner comparisons"
    return Finding(name, WARN, text, fix, details)


def _with_interval(values: Tensor, sign: str = "") -> str:
    return interval_text(float(values.mean()), *bootstrap_interval(values), sign=sign)
