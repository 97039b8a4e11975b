"""Let the policies of a run answer, and score the answers by the run's scorer and by gold."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mode
from typing import Any

import torch
from torch import Tensor

from rlhf.config import InputError, ScorerConfig
from rlhf.console import say
from rlhf.data import Row, other_columns, prompt_of
from rlhf.diagnose.options import DiagnoseOptions, Subject, columns_of, good_answers
from rlhf.distributed import default_device
from rlhf.functional import final_scores
from rlhf.policy import Policy, PolicyOptions
from rlhf.ppo.passes import policy_logprobs
from rlhf.ppo.rollout import Responses
from rlhf.reward.report.measures import ranked_pairs
from rlhf.sampling import Generation, context_length, generate, uniform_noise
from rlhf.scorers import Tokens, load_scorer, score_responses
from rlhf.tokenizer import hash_rendering

DIAGNOSIS_KEY = (1 << 31) + 2  # names the random numbers; no update and no evaluation has this key
PPO_SAMPLES = 4  # answers of PPO's policy to each prompt


@dataclass
class Ranked:
    """A scorer on held-out rankings.

    Attributes:
        right: (M,) whether it orders each pair right; a tie counts one half.
        owners: (M,) the number of each pair's prompt.
        scores, worth: (R, K) its scores, and the share of the other answers that are worse, of the
            rows with the most common number of answers.
    """

    right: Tensor
    owners: Tensor
    scores: Tensor
    worth: Tensor


@dataclass
class Scored:
    """What was measured on P prompts.

    Attributes:
        proxy, gold: (P, N) of the SFT policy's answers, by the run's scorer and by gold; gold is
            the proxy where nobody is trusted.
        ended: share of the SFT policy's answers that end by themselves.
        ppo_proxy, ppo_gold, kl: (P,) means over PPO's answers to each prompt; kl to the SFT policy,
            nats per response.
        good: (P,) gold scores of known-good answers, nan where there is none; None without any.
        ranked: the scorer on held-out rankings, where there are any.
    """

    proxy: Tensor
    gold: Tensor
    ended: float
    ppo_proxy: Tensor | None = None
    ppo_gold: Tensor | None = None
    kl: Tensor | None = None
    good: Tensor | None = None
    ranked: Ranked | None = None


@dataclass
class Answers:
    """Answers to each prompt, one prompt after the other."""

    policy: Policy
    rows: list[Row]  # one per answer
    ids: list[list[int]]  # of the prompts
    sampled: Generation

    @property
    def texts(self) -> list[str]:
        return [self.policy.text(ids) for ids in self.sampled.ids]


class Judging:
    """A scorer, loaded once, and the penalty of answers that do not end."""

    def __init__(self, config: ScorerConfig, field: str, code: bool, penalty: float | None = None):
        self.scorer = load_scorer(config, default_device(), field=field, trust_remote_code=code)
        self.field, self.penalty = field, penalty

    def answers(self, answers: Answers) -> Tensor:
        """(P * N,) scores of sampled answers."""
        rendering = hash_rendering(answers.policy.tokenizer)
        tokens = Tokens(answers.ids, answers.sampled.ids, rendering)
        scores = self._score(answers.rows, answers.texts, tokens)
        finished = torch.tensor(answers.sampled.finished)
        return final_scores(scores.total, finished, self.penalty, scores.dense_total)

    def texts(self, rows: list[Row], texts: list[str]) -> Tensor:
        """Scores of complete answers."""
        return self._score(rows, texts).total

    def _score(self, rows: list[Row], texts: list[str], tokens: Tokens | None = None) -> Any:
        given = [columns_of(row) for row in rows]
        columns = {name: [row.get(name) for row in given] for name in other_columns(given)}
        prompts = [prompt_of(row) for row in rows]
        return score_responses(self.scorer, prompts, texts, self.field, tokens, columns)


def measure(options: DiagnoseOptions, subject: Subject) -> Scored:
    """Sample and score everything."""
    code, count = options.trust_remote_code, options.samples_per_prompt
    proxy = Judging(subject.scorer, "reward", code, subject.penalty)
    gold = Judging(subject.gold, "gold", code) if subject.gold else proxy
    rows, shape = subject.rows, (len(subject.rows), count)
    say(f"{count} answers of {subject.sft} to each of {len(rows)} prompts")
    answers = sample(options, subject, subject.sft, count, 0)
    by_proxy = proxy.answers(answers)
    by_gold = gold.answers(answers) if subject.gold else by_proxy
    ended = torch.tensor(answers.sampled.finished).float().mean().item()
    found = Scored(by_proxy.view(shape), by_gold.view(shape), ended)
    found.good = _good_scores(options, rows, gold)
    if any("ranks" in row for row in rows):
        found.ranked = on_rankings(rows, proxy)
    if subject.ppo:
        say(f"{PPO_SAMPLES} answers of {subject.ppo} to each of them")
        after = sample(options, subject, subject.ppo, PPO_SAMPLES, 1)
        found.kl = kl_to(answers.policy, after, options.batch_size).view(len(rows), -1).mean(dim=1)
        values = proxy.answers(after)
        trusted = gold.answers(after) if subject.gold else values
        found.ppo_proxy, found.ppo_gold = (
            scores.view(len(rows), -1).mean(dim=1) for scores in (values, trusted)
        )
    return found


def sample(
    options: DiagnoseOptions, subject: Subject, path: str, count: int, number: int
) -> Answers:
    """Sample answers as PPO does: from the whole distribution, at its temperature."""
    ppo = subject.config.ppo
    length = options.response_length or ppo.response_length
    settings = PolicyOptions(
        path,
        temperature=options.temperature or ppo.temperature,
        top_p=1.0,
        top_k=0,
        response_length=length,
        trust_remote_code=options.trust_remote_code,
    )
    policy = Policy(settings, path, "ppo" if number else "sft")
    prompts = [_asked(policy, row) for row in subject.rows]
    ids = [policy.encode_prompt(prompt) for prompt in prompts]
    longest, context = max(map(len, ids)), context_length(policy.model)
    if longest + length > context:
        raise InputError(
            f"a prompt has {longest} tokens and response_length is {length}, but the context of "
            f"{path} is {context}; lower response_length, or give shorter prompts"
        )
    repeated = [row for row in ids for _ in range(count)]
    key = (options.seed, DIAGNOSIS_KEY, number)
    noise = uniform_noise(key, range(len(repeated)), length)
    made = generate(policy.model, repeated, policy.sampling, noise, options.batch_size)
    rows = [row for row in subject.rows for _ in range(count)]
    return Answers(policy, rows, repeated, made)


def _asked(policy: Policy, row: Row) -> Any:
    prompt = prompt_of(row)
    if not isinstance(prompt, str) and policy.why_text:
        raise InputError(
            f"{policy.path} continues text ({policy.why_text}), but a prompt is a conversation; "
            "give prompts=<a file of texts>"
        )
    return prompt


@torch.no_grad()
def kl_to(reference: Policy, answers: Answers, batch_size: int) -> Tensor:
    """KL of the policy that answered to the reference, k1 estimate summed over tokens, (N,) nats
    per response."""
    found = []
    fill, device = reference.tokenizer.pad_token_id, reference.model.device
    for start in range(0, len(answers.ids), batch_size):
        rows = slice(start, start + batch_size)
        part = Generation(**{name: values[rows] for name, values in vars(answers.sampled).items()})
        padded = Responses.padded(answers.ids[rows], part, fill, device)
        logprobs, _ = policy_logprobs(reference.model, padded, reference.sampling)
        found.append((padded.sampler_logprobs - logprobs).sum(dim=1).cpu())
    return torch.cat(found)


def _good_scores(options: DiagnoseOptions, rows: list[Row], gold: Judging) -> Tensor | None:
    """(P,) mean gold score of the known-good answers of each row."""
    if options.good is not None:
        return torch.full((len(rows),), options.good)
    answers = [good_answers(row) for row in rows]
    if not any(answers):
        return None
    owners = [row for row, texts in zip(rows, answers, strict=True) for _ in texts]
    scores = gold.texts(owners, [text for texts in answers for text in texts])
    parts = scores.split([len(texts) for texts in answers])
    return torch.stack([part.mean() if len(part) else torch.tensor(torch.nan) for part in parts])


def on_rankings(rows: list[Row], proxy: Judging) -> Ranked:
    """Score the ranked answers of held-out rows."""
    rows = [row for row in rows if "ranks" in row]
    owners = [row for row in rows for _ in row["responses"]]
    scores = proxy.texts(owners, [text for row in rows for text in row["responses"]])
    sizes = [len(row["responses"]) for row in rows]
    by_row = list(scores.split(sizes))
    ranked = [{"ranks": row["ranks"], "lengths": [1] * len(row["ranks"])} for row in rows]
    pairs = ranked_pairs(by_row, ranked)
    size = mode(sizes)
    of_size = [i for i, number in enumerate(sizes) if number == size]
    ranks = torch.tensor([rows[i]["ranks"] for i in of_size])  # (R, K)
    worse, equal = ranks[:, None, :] > ranks[:, :, None], ranks[:, None, :] == ranks[:, :, None]
    worth = (worse.sum(dim=2) + (equal.sum(dim=2) - 1) / 2) / (size - 1)
    chosen = torch.stack([by_row[i] for i in of_size])
    return Ranked((1 + pairs.gap.sign()) / 2, pairs.row, chosen, worth)
