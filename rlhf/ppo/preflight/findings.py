"""What the preflight judges: numbers of a run in, a `Check` with its remedy out.

Left out: where the numbers come from (`rlhf.ppo.preflight.preflight`, `rlhf.ppo.preflight.memory`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.config import PPOStageConfig
from rlhf.console import table
from rlhf.functional import best_of_n, best_of_n_kl, bootstrap_interval
from rlhf.ppo.preflight.memory import MemoryEstimate, Step, remedy
from rlhf.ppo.rollout import Rollout
from rlhf.sampling import Generation, Sampling

FULL = 0.85  # share of the memory beyond which a run is at risk
LENGTH_DRIVEN = 0.8  # correlation of score and length beyond which length is what is scored
OK, WARN, FAIL = "ok", "WARN", "FAIL"


@dataclass
class Check:
    """One check.

    Attributes:
        status: "ok", "WARN" or "FAIL".
        text: what was found, with its number.
        remedy: what to do about it; empty when ok.
        details: lines to print below as they are.
    """

    name: str
    status: str
    text: str
    remedy: str = ""
    details: str = ""


def check_memory(estimate: MemoryEstimate, room: int, config: PPOStageConfig) -> Check:
    """Compare the estimate with what the device has.

    Args:
        room: bytes that this process can have in all, the models it has loaded included.
    """
    share = estimate.total / room
    unit, divisor = ("GiB", 2**30) if estimate.total >= 2**30 else ("MiB", 2**20)
    columns = ("weights", "gradients", "adam", "activations")
    rows = [
        (name, *(round(getattr(model, column) / divisor, 1) for column in columns))
        for name, model in estimate.models.items()
    ]
    details = table(rows, (unit, "weights", "gradients", "Adam", "activations"))
    text = (
        f"about {_size(estimate.total)} of {_size(room)} ({share:.0%}), of which sampling may take "
        f"{_size(estimate.sampling)}"
    )
    status = FAIL if share > 1 else WARN if share > FULL else OK
    fix = remedy(estimate, config) if status != OK else ""
    return Check("memory", status, text, fix, details)


def check_step(
    step: Step, estimate: MemoryEstimate, free: int, part: Rollout, config: PPOStageConfig
) -> Check:
    """Judge one step at the longest length; what Adam will add is counted on top.

    Args:
        free: bytes that this process could still get before the step.
    """
    shape = f"{len(part)} x ({part.prompt_ids.shape[1]} + {part.response_ids.shape[1]}) tokens"
    text = f"{shape}: {step.seconds:.2f} s"
    if step.problem == "out of memory":
        return Check("longest step", FAIL, f"{text}, out of memory", remedy(estimate, config))
    if step.problem:
        return Check(
            "longest step",
            FAIL,
            f"{text}, and a loss that is {step.problem}",
            "use precision=float32 and model.dtype=float32",
        )
    if step.rise is None:
        return Check("longest step", OK, text)
    needed = step.rise + estimate.sum("adam")
    status = FAIL if needed > free else WARN if needed > FULL * free else OK
    text += f", {_size(step.rise)}; with Adam states {_size(needed)} of {_size(free)}"
    return Check("longest step", status, text, remedy(estimate, config) if status != OK else "")


def _size(num_bytes: float) -> str:
    unit, divisor = ("GiB", 2**30) if num_bytes >= 2**30 else ("MiB", 2**20)
    return f"{num_bytes / divisor:.1f} {unit}"


def check_first_ratio(ratio_off: float, rollout: Rollout, limit: float | None) -> Check:
    """Check that rollout and training read the same policy, and that it is the reference.

    Args:
        ratio_off: largest |ratio - 1| of the first minibatch.
        limit: largest one allowed, of the ratio to the reference too; None: any.
    """
    difference = rollout.logprobs - rollout.ref_logprobs  # 0 at masked positions
    reference_off = float(torch.expm1(difference).abs().max())
    text = (
        f"largest |ratio - 1| {ratio_off:.2g}; KL to the reference "
        f"{float(difference.sum(dim=1).mean()):.2g} nats per response"
    )
    # negated, so that nan fails too
    if limit is None or (ratio_off <= limit and reference_off <= limit):
        return Check("first ratio", OK, text)
    return Check(
        "first ratio",
        FAIL,
        f"{text}: two readings of the same policy differ",
        "switch dropout off in a model of your own code; use precision=float32, or another "
        "model.attn_implementation",
    )


def check_tokenizer(tokenizer: Any, prompts: Sequence[Any], responses: Sequence[str]) -> Check:
    """Check that text survives tokenisation, and the special tokens."""
    if any(not isinstance(p, str) for p in prompts) and not tokenizer.chat_template:
        return Check(
            "tokenizer",
            FAIL,
            "the prompts are conversations and there is no chat template",
            "set model.chat_template",
        )
    rendered = [
        p
        if isinstance(p, str)
        else tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    texts = [*rendered, *responses]
    back = [
        tokenizer.decode(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for text in texts
    ]
    # word-level and SentencePiece tokenizers do not keep every space
    pairs = [("".join(a.split()), "".join(b.split())) for a, b in zip(texts, back, strict=True)]
    changed = [(a, b) for a, b in pairs if a != b]
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if changed:
        before, after = changed[0]
        at = max(0, len(os.path.commonprefix(changed[0])) - 10)
        return Check(
            "tokenizer",
            WARN,
            f"{len(changed)} of {len(texts)} texts are others after text -> ids -> text, e.g. "
            f"{before[at : at + 30]!r} -> {after[at : at + 30]!r}",
            "use the tokenizer that the model was trained with (model.tokenizer)",
        )
    if pad == eos:
        text = f"pad and EOS are the same token ({pad}), which other libraries mask as padding"
        return Check("tokenizer", WARN, text, "give the tokenizer a pad token of its own")
    text = f"{len(prompts)} prompts and {len(responses)} responses survive text -> ids -> text"
    return Check("tokenizer", OK, f"{text}; pad {pad}, EOS {eos}")


def check_stop_token(
    eos: int,
    sampling: Sampling,
    rollout: Rollout,
    least_share: float | None,
    sample_longer: Callable[[], tuple[int, Generation]],
) -> Check:
    """Check that responses can end, and do; if not, tell a stage at fault from a budget too small
    by what a larger budget gives.

    Args:
        eos: id of the tokenizer's EOS.
        least_share: of responses that ought to end; None: any.
        sample_longer: returns a larger budget, tokens, and responses within it.
    """
    if eos in sampling.forbidden.tolist():
        return Check(
            "stop token",
            FAIL,
            f"EOS (id {eos}) is one of the ids that are never sampled: padding, or beyond the "
            "number of tokens that the tokenizer counts",
            "set the eos_token of model.tokenizer to the token that SFT responses end with",
        )
    share = float(rollout.finished.float().mean())
    text = (
        f"{share:.0%} of the responses end, mean length {float(rollout.lengths.float().mean()):.1f}"
        f" of at most {sampling.max_new_tokens} tokens"
    )
    if least_share is None or share >= least_share:
        return Check("stop token", OK, text)
    budget, longer = sample_longer()
    ended = [len(ids) for ids, end in zip(longer.ids, longer.finished, strict=True) if end]
    share = len(ended) / len(longer.ids)
    if share >= least_share:
        needed = sorted(ended)[math.ceil(0.95 * len(ended)) - 1]
        fix = f"raise ppo.response_length to about {needed}, where 95 % of these have ended"
    else:
        fix = "the SFT stage is at fault: train it longer, on responses that all end with EOS"
    return Check("stop token", WARN, f"{text}; given {budget} tokens, {share:.0%} do", fix)


def check_scorer(
    score: Any, scores: Tensor, lengths: Tensor, least_std: float, tolerance: float
) -> Check:
    """Check that scores differ between responses, and that nothing else changes them.

    Args:
        score: row numbers -> (len(rows),) scores.
        scores: (N,) of all rows.
        lengths: (N,) tokens; the shortest responses are scored alone and beside the longest, which
            pads them most.
        least_std: standard deviation that counts as constant.
        tolerance: difference that is rounding; like the others, in standard deviations.
    """
    std = float(scores.std(unbiased=False))
    text = f"mean score {float(scores.mean()):.3g}, standard deviation {std:.3g}"
    if std <= least_std:
        return Check(
            "scorer",
            FAIL,
            f"{text}: a constant, there is nothing to learn",
            "correct the scorer; if no response deserves more yet, train the SFT stage further",
        )
    order = lengths.argsort(stable=True).tolist()
    short, rows = order[:4], order[:4] + order[-4:]
    together = score(rows)
    noise = float((score(rows) - together).abs().max()) / std
    if noise > tolerance:
        return Check(
            "scorer",
            WARN,
            f"{text}; the same batch, scored twice, differs by {noise:.1g}",
            "make the scorer deterministic, or raise ppo.batch_size: noise slows PPO down",
        )
    alone = torch.cat([score([row]) for row in short])
    leak = float((alone - together[: len(short)]).abs().max()) / std
    text += f"; alone or in a batch it differs by {leak:.1g}"
    if leak <= tolerance:
        return Check("scorer", OK, text)
    return Check(
        "scorer",
        FAIL if leak > 0.1 else WARN,
        f"{text}: a score depends on the other responses of its batch",
        "check the padding and attention mask of the scorer; scorer.batch_size=1 avoids it",
    )


def check_length(scores: Tensor, lengths: Tensor) -> Check:
    """Check that scores are not the length of the response in disguise."""
    if len(lengths.unique()) == 1:
        return Check("length", OK, "every response has the same length")
    correlation = float(torch.corrcoef(torch.stack([scores.double(), lengths.double()]))[0, 1])
    text = f"correlation of score and response length {correlation:.2f}"
    if abs(correlation) <= LENGTH_DRIVEN:
        return Check("length", OK, text)
    return Check(
        "length",
        WARN,
        f"{text}: PPO would learn to write {'more' if correlation > 0 else 'less'}",
        "see the reward stage's length-matched accuracy, and add comparisons of equal length",
    )


def check_penalty(finished_scores: Tensor, penalty: float) -> Check:
    """Check that it pays to end a response."""
    if not len(finished_scores):
        return Check("missing EOS", OK, "no response ends: see `stop token`")
    mean = float(finished_scores.mean())
    text = f"responses that end score {mean:.3g}, those that do not {penalty:g}"
    if mean > penalty:
        return Check("missing EOS", OK, text)
    return Check(
        "missing EOS",
        WARN,
        f"{text}: not ending pays",
        "lower ppo.missing_eos_penalty, or set scorer.normalize=standardise",
    )


def check_best_of_n(scores: Tensor, judged: Tensor | None, least_std: float) -> Check:
    """Say what choosing the best of n responses by the scorer is worth: as good as PPO may get.

    Args:
        scores: (P, N) of the scorer, N responses to each prompt, N >= 4.
        judged: (P, N) of the independent scorer.
        least_std: mean standard deviation within a prompt that leaves nothing to choose from.
    """
    most = scores.shape[1]
    counts = (1, 4, most)
    rows = [("scorer", *(_interval(best_of_n(scores, n)) for n in counts))]
    if judged is not None:
        judgement = (_interval(best_of_n(scores, n, judged)) for n in counts)
        rows.append(("evaluation.scorer", *judgement))
    details = table(rows, ("best of", *map(str, counts)))
    std = float(scores.std(dim=1, unbiased=False).mean())
    if std <= least_std:
        return Check(
            "best of n",
            WARN,
            f"the responses to one prompt score alike (standard deviation {std:.2g}): nothing to "
            "choose from",
            "raise ppo.temperature, or train the SFT stage on more varied responses",
            details,
        )
    hope = f"PPO can hope for about the best of {most} ({best_of_n_kl(most):.1f} nats of KL)"
    if judged is None:
        return Check("best of n", OK, f"{hope}, by the scorer that it trains on", "", details)
    gain = best_of_n(scores, most, judged) - best_of_n(scores, 1, judged)
    low, high = bootstrap_interval(gain)
    worth = f"{float(gain.mean()):+.3g} [{low:.3g}, {high:.3g}] by evaluation.scorer"
    if low > 0:
        return Check("best of n", OK, f"{hope}: {worth}", "", details)
    return Check(
        "best of n",
        WARN,
        f"the best of {most} by the scorer is not clearly better than one response: {worth}",
        "the reward model is at fault and PPO cannot help: give it more or cleaner comparisons",
        details,
    )


def _interval(values: Tensor) -> str:
    low, high = bootstrap_interval(values)
    return f"{float(values.mean()):.3g} [{low:.3g}, {high:.3g}]"
