"""Responses of the policy before training, and the scorer on them.

Does training read what was sampled, does text survive the tokenizer, do responses end? Is the score
a function of the response alone, and worth following?
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoint import StageRecord, read_record
from rlhf.config import InputError
from rlhf.console import interval_text, table
from rlhf.distributed import use_bfloat16
from rlhf.functional import best_of_n, best_of_n_kl, bootstrap_interval
from rlhf.ppo.evaluation import response_ids, response_texts
from rlhf.ppo.passes import policy_logprobs
from rlhf.ppo.preflight.findings import FAIL, OK, WARN, Finding
from rlhf.ppo.rollout import Responses, Rollout, collect, read_tokens
from rlhf.ppo.scoring import score_sampled
from rlhf.ppo.trainer import PPOTrainer
from rlhf.sampling import Generation, Sampling, context_length, generate, uniform_noise
from rlhf.scorers import Scorer, Scores
from rlhf.tokenizer import render_prompt

PREFLIGHT_KEY = (1 << 31) + 1  # names the random numbers; no update and no evaluation has this key
NUM_SAMPLES = 16  # to each prompt
LENGTH_DRIVEN = 0.8  # correlation of score and length beyond which the score is the length


@dataclass
class Samples:
    """`NUM_SAMPLES` responses to each prompt, one prompt after the other."""

    prompts: list[dict[str, Any]]  # encoded, one per response
    rollout: Rollout  # without scores
    ids: list[list[int]]  # of the responses
    ratio_off: float  # largest |ratio - 1| of the first minibatch


def sample_policy(trainer: PPOTrainer, prompts: Sequence[dict[str, Any]]) -> Samples:
    """Sample `NUM_SAMPLES` responses to each prompt, on all processes together."""
    accelerator, config = trainer.accelerator, trainer.config
    rows = [prompt for prompt in prompts for _ in range(NUM_SAMPLES)]
    padded = rows + rows[-1:] * (-len(rows) % accelerator.num_processes)
    longest = max(len(row["input_ids"]) for row in rows) + config.ppo.response_length
    first = min(config.ppo.rows_of(longest) * accelerator.num_processes, len(padded))
    order = torch.arange(len(padded), device=accelerator.device)
    minibatches = [part for part in order.tensor_split([first]) if len(part)]
    rollout = collect(
        trainer.actors,
        padded,
        (config.seed, PREFLIGHT_KEY),
        trainer.sampling,
        config.ppo,
        accelerator,
        minibatches,
        with_scores=False,  # the main process calls the scorer later
        with_values=False,
    )

    def read(part: Responses) -> Tensor:
        return policy_logprobs(trainer.actors.policy, part, trainer.sampling)[0].detach()

    with accelerator.autocast():  # with gradients, as in training
        again = read_tokens(rollout, minibatches[:1], read, config.ppo, accelerator)
    log_ratio = (again - rollout.logprobs)[:first]
    rollout = rollout.select(order[: len(rows)])
    ratio_off = float(torch.expm1(log_ratio).abs().max())
    return Samples(rows, rollout, response_ids(rollout), ratio_off)


def examine_policy(trainer: PPOTrainer, samples: Samples) -> list[Finding]:
    """Examine ratio, tokenizer and stop token, on the main process."""
    tokenizer, watchdog = trainer.actors.tokenizer, trainer.config.watchdog
    is_reference = trainer.config.ppo.reference is None
    sampling, prompts = trainer.sampling, samples.prompts[::NUM_SAMPLES]
    texts = response_texts(samples.rollout, tokenizer, samples.prompts)

    def sample_longer() -> tuple[int, Generation]:
        """Four responses to each prompt, with four times the budget or what the context has."""
        ids = [p["input_ids"] for p in prompts for _ in range(4)]
        room = context_length(trainer.actors.policy) - max(map(len, ids))
        budget = min(4 * sampling.max_new_tokens, room)
        noise = uniform_noise((trainer.config.seed, PREFLIGHT_KEY), range(len(ids)), budget)
        longer = replace(sampling, max_new_tokens=budget)
        batch_size = max(1, trainer.config.ppo.rollout_batch_size // 4)  # the cache is longer too
        with trainer.accelerator.autocast():
            return budget, generate(trainer.actors.policy, ids, longer, noise, batch_size)

    model = trainer.config.model
    record = read_record(str(model.path), model.revision)
    can_chat = bool(tokenizer.chat_template) and isinstance(prompts[0]["prompt"], str)
    stop_token = examine_stop_token(
        tokenizer.eos_token_id,
        sampling,
        samples.rollout,
        watchdog.eos_rate,
        sample_longer,
        remedy_for_no_end(str(model.path), record, can_chat),
    )
    penalty = None if trainer.config.ppo.mask_truncated else trainer.config.eos_penalty
    if stop_token.status == WARN and penalty is not None:
        text = f"{stop_token.text}; the others get ppo.missing_eos_penalty={penalty:g} for a score"
        stop_token = replace(stop_token, status=FAIL, text=text)
    return [
        examine_first_ratio(samples.ratio_off, samples.rollout, watchdog.first_ratio, is_reference),
        examine_tokenizer(tokenizer, [p["prompt"] for p in prompts], texts),
        stop_token,
    ]


def examine_first_ratio(
    ratio_off: float, rollout: Rollout, limit: float | None, is_reference: bool = True
) -> Finding:
    """Examine whether rollout and training read the same policy, and whether it is the reference.

    Neither `ratio_off` nor the ratio to the reference may differ from 1 by more than `limit`.

    Args:
        is_reference: False where `ppo.reference` is another model.
    """
    difference = rollout.logprobs - rollout.ref_logprobs  # 0 at masked positions
    reference_off = float(torch.expm1(difference).abs().max()) if is_reference else 0.0
    text = (
        f"largest |ratio - 1| {ratio_off:.2g}; KL to the reference "
        f"{float(difference.sum(dim=1).mean()):.2g} nats per response"
    )
    # this way round, so that nan fails too
    if limit is None or (ratio_off <= limit and reference_off <= limit):
        return Finding("first ratio", OK, text)
    text += ": two readings of the same policy differ"
    fix = "switch dropout off in a model of your own code; use precision=float32, or another "
    return Finding("first ratio", FAIL, text, fix + "model.attn_implementation")


def examine_tokenizer(tokenizer: Any, prompts: Sequence[Any], responses: Sequence[str]) -> Finding:
    """Examine whether text survives tokenisation, and the special tokens."""
    name = "tokenizer"
    if any(not isinstance(p, str) for p in prompts) and not tokenizer.chat_template:
        text = "the prompts are conversations, but the tokenizer has no chat template"
        return Finding(name, FAIL, text, "set model.chat_template")
    rendered = [p if isinstance(p, str) else render_prompt(p, tokenizer) for p in prompts]
    texts = [*rendered, *responses]
    back = [
        tokenizer.decode(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for text in texts
    ]
    # word-level and SentencePiece tokenizers do not keep every space
    pairs = [("".join(a.split()), "".join(b.split())) for a, b in zip(texts, back, strict=True)]
    changed = [(a, b) for a, b in pairs if a != b]
    if changed:
        before, after = changed[0]
        at = max(0, len(os.path.commonprefix(changed[0])) - 10)
        text = (
            f"{len(changed)} of {len(texts)} texts change from text -> ids -> text, e.g. "
            f"{before[at : at + 30]!r} -> {after[at : at + 30]!r}"
        )
        fix = "use the tokenizer that the model was trained with (model.tokenizer)"
        return Finding(name, WARN, text, fix)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    text = f"{len(prompts)} prompts and {len(responses)} responses survive text -> ids -> text"
    return Finding(name, OK, f"{text}; pad {pad}, EOS {eos}")


def examine_stop_token(
    eos: int,
    sampling: Sampling,
    rollout: Rollout,
    least_share: float | None,
    sample_longer: Callable[[], tuple[int, Generation]],
    remedy: str,
) -> Finding:
    """Examine whether responses can end, and do. If too few end, a larger budget tells whether the
    budget is too small or the policy at fault.

    Args:
        eos: id of the tokenizer's EOS.
        least_share: share of responses that ought to end; None: any.
        sample_longer: returns a larger budget, tokens, and responses within it.
        remedy: for a policy that is at fault.
    """
    name = "stop token"
    if eos in sampling.forbidden.tolist():
        text = f"EOS (id {eos}) is never sampled: it is beyond the tokenizer's ids"
        fix = "set the eos_token of model.tokenizer to the token that responses end with"
        return Finding(name, FAIL, text, fix)
    share = float(rollout.finished.float().mean())
    text = (
        f"{share:.0%} of the responses end, mean length {float(rollout.lengths.float().mean()):.1f}"
        f" of at most {sampling.max_new_tokens} tokens"
    )
    if least_share is None or share >= least_share:
        return Finding(name, OK, text)
    budget, longer = sample_longer()
    ended = [len(ids) for ids, end in zip(longer.ids, longer.finished, strict=True) if end]
    share = len(ended) / len(longer.ids)
    if share >= least_share:
        needed = sorted(ended)[math.ceil(0.95 * len(ended)) - 1]
        fix = f"raise ppo.response_length to about {needed}, where 95 % of these have ended"
        override = f"ppo.response_length={needed}"
    else:
        fix = remedy
        override = "ppo.missing_eos_penalty=null"
    text = f"{text}; given {budget} tokens, {share:.0%} do"
    return Finding(name, WARN, text, fix, override=override)


def remedy_for_no_end(path: str, record: StageRecord | None, can_chat: bool) -> str:
    """Say what to do about a policy that does not end its responses, by where it comes from.

    Args:
        record: of the stage that wrote the policy; None for another model.
        can_chat: the prompts are text, but the tokenizer has a chat template.
    """
    if record is not None and record.stage == "sft":
        return "the SFT stage is at fault: train it longer, on responses that all end with EOS"
    if record is not None:
        return (
            f"the PPO run that wrote {path} is at fault: start from the model that it started "
            f"from (model.path={record.parent})"
        )
    remedy = f"train {path} first, on responses that all end: python -m rlhf.sft model.path={path}"
    if can_chat:
        remedy += "; if it is a chat model, set dataset.as_conversation=true: the prompts are text"
    return remedy


# --- The scorer -----------------------------------------------------------------------------------


def examine_scoring(
    trainer: PPOTrainer, samples: Samples, independent: Scorer | None
) -> list[Finding]:
    """Examine the scorer on the samples, on the main process."""
    watchdog, ppo = trainer.config.watchdog, trainer.config.ppo
    finished, lengths = samples.rollout.finished.cpu(), samples.rollout.lengths.cpu()
    rows, least_std = range(len(samples.ids)), watchdog.score_std or 0.0
    tolerance = 1e-2 if use_bfloat16(trainer.config.precision) else 1e-4

    def score(rows: Sequence[int], *scorer: Any) -> Scores:
        """Score some of the samples, without a penalty for a missing EOS."""
        prompts, ids = [samples.prompts[row] for row in rows], [samples.ids[row] for row in rows]
        with trainer.accelerator.autocast():  # as in `collect`
            return score_sampled(trainer.actors, prompts, ids, *scorer)

    try:
        scores = score(rows)
        finding = examine_scorer(
            lambda rows: score(rows).total, scores.total, lengths, least_std, tolerance
        )
    except InputError as error:
        return [Finding("scorer", FAIL, str(error), "correct the scorer, or its input")]
    if finding.status == FAIL:
        return [finding]
    findings = [finding, examine_length(scores.total, lengths)]
    penalty, device = trainer.config.eos_penalty, trainer.accelerator.device
    dense = scores.dense_total[:, None].to(device)
    scored = replace(samples.rollout, scores=scores.total.to(device), dense_rewards=dense)
    total = scored.final_scores(penalty, ppo.whiten_scores).cpu()
    if penalty is not None:
        findings.append(examine_penalty(total[finished], penalty))
    judged = None
    try:
        if independent is not None:
            judged = score(rows, independent, "evaluation.scorer").total.view(-1, NUM_SAMPLES)
    except InputError as error:
        fix = "correct it, or set evaluation.scorer=null"
        return [*findings, Finding("best of n", FAIL, str(error), fix)]
    return [*findings, examine_best_of_n(total.view(-1, NUM_SAMPLES), judged, least_std)]


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
        fix = (
            "correct the scorer; if no response deserves more yet, train the policy with SFT first"
        )
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
        fix = "raise ppo.temperature, or train the policy with SFT on more varied responses"
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
