"""A rollout: a response to each prompt of a batch, its score, and log-probs and values per token.

`trainer.py` comes before: it collects one rollout per update. `update.py` comes after: it trains on
the rollout. Every process samples and scores its share, and then holds the whole batch. So
whitening and statistics are global, and a minibatch does not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.data import pad
from rlhf.failures import on_every_process, phase
from rlhf.functional import final_scores
from rlhf.ppo.actors import Actors
from rlhf.ppo.passes import critic_values, policy_logprobs, read_policy
from rlhf.ppo.scoring import score_sampled, score_while_sampling
from rlhf.sampling import Generation, Sampling, engine_of, generate, uniform_noise
from rlhf.scorers import Scorer, Scores, component_names, reward_models


@dataclass(frozen=True)
class Responses:
    """B prompts with one sampled response each; P prompt tokens, T response tokens.

    Attributes:
        prompt_ids, prompt_mask: (B, P) int64 and bool, left-padded.
        response_ids, response_mask: (B, T) int64 and bool, right-padded, with the stop token or
            stop string.
        finished: (B,) bool; True where a stop token or stop string was sampled.
        sampler_logprobs: (B, T) of the policy, by the sampler's forward pass, nats.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    finished: Tensor
    sampler_logprobs: Tensor

    @classmethod
    def padded(
        cls, prompts: Sequence[list[int]], sampled: Generation, fill: int, device: torch.device
    ) -> Responses:
        """Pad prompts on the left and responses on the right, with the token `fill`."""
        prompt_mask = [[True] * len(row) for row in prompts]
        response_mask = [[True] * len(row) for row in sampled.ids]
        return cls(
            prompt_ids=pad(prompts, fill, "left", device),
            prompt_mask=pad(prompt_mask, False, "left", device),
            response_ids=pad(sampled.ids, fill, device=device),
            response_mask=pad(response_mask, False, device=device),
            finished=torch.tensor(sampled.finished, device=device),
            sampler_logprobs=pad(sampled.logprobs, 0.0, device=device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def sequence_ids(self) -> Tensor:
        """(B, L): prompt and response without a gap, right-padded to the longest row.

        prompt . . 1 2, response 3 4 . -> 1 2 3 4 . . . , cut to L
        """
        both = torch.cat([self.prompt_ids, self.response_ids], dim=1)  # (B, P + T)
        start = (~self.prompt_mask).sum(dim=1, keepdim=True)  # (B, 1)
        columns = torch.arange(self.sequence_mask.shape[1], device=both.device)
        # columns past the end wrap around into the padding before the prompt
        return both.gather(1, (start + columns) % both.shape[1])

    @cached_property
    def sequence_mask(self) -> Tensor:
        """(B, L)."""
        lengths = self.prompt_mask.sum(dim=1) + self.lengths
        return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]

    @cached_property
    def state_positions(self) -> Tensor:
        """(B, T): position in the sequence of the token before each response token; below L."""
        before = self.prompt_mask.sum(dim=1, keepdim=True) - 1  # (B, 1)
        steps = torch.arange(self.response_ids.shape[1], device=before.device)
        return (before + steps).clamp(max=self.sequence_mask.shape[1] - 1)

    @property
    def lengths(self) -> Tensor:
        """(B,) response tokens."""
        return self.response_mask.sum(dim=1)

    def __len__(self) -> int:
        return len(self.response_ids)

    def select(self, rows: Tensor) -> Self:
        """Take some rows, and cut the padding that they do not need."""
        prompt_width = int(self.prompt_mask[rows].sum(dim=1).max())
        response_width = int(self.response_mask[rows].sum(dim=1).max())

        def take(name: str, tensor: Tensor) -> Tensor:
            if tensor.dim() == 1 or name == "component_scores":
                return tensor[rows]
            if name.startswith("prompt"):
                return tensor[rows][:, -prompt_width:]
            return tensor[rows][:, :response_width]

        return replace(self, **{name: take(name, x) for name, x in self.tensors().items()})


@dataclass(frozen=True)
class Rollout(Responses):
    """Responses with their scores, and log-probs and values of their tokens.

    Attributes:
        scores: (B,) of the scorer, normalised, with the sum of `dense_rewards`. See `final_scores`.
        dense_rewards: (B, T) rewards per token; zeros for most scorers.
        component_scores: (B, C) of the scorer's C components; C is 0 for most scorers.
        cut: (B,) bool; True where a reward model read only the beginning of the response.
        logprobs: (B, T) of the policy that sampled, by the training forward pass, nats.
        ref_logprobs: (B, T) of the reference, nats.
        values: (B, T) of the critic, at the state before each token; zeros without a critic.
        loss_mask: (B, T) bool; the response tokens that losses and whitening count: all of them, or
            with `ppo.mask_truncated` those of finished responses.
    """

    scores: Tensor
    dense_rewards: Tensor
    component_scores: Tensor
    cut: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    loss_mask: Tensor

    def final_scores(self, missing_eos_penalty: float | None, whiten: bool = False) -> Tensor:
        """(B,) scores with the penalty for a missing EOS. With `whiten`, they are first whitened
        over the responses that the losses count."""
        counted = self.loss_mask.any(dim=1) if whiten else None
        totals = self.dense_rewards.sum(dim=1)
        return final_scores(self.scores, self.finished, missing_eos_penalty, totals, counted)


@dataclass(frozen=True)
class Experience(Rollout):
    """A rollout with rewards and advantages, ready to be trained on; (B, T) each.

    Attributes:
        kl: to the reference, by `ppo.kl_estimator`.
        raw_advantages: before whitening.
        returns: targets of the critic.
    """

    kl: Tensor
    rewards: Tensor
    raw_advantages: Tensor
    advantages: Tensor
    returns: Tensor

    @classmethod
    def of_equal_advantages(cls, responses: Responses, logprobs: Tensor) -> Experience:
        """A batch of unscored responses with advantage 1 at every token, which costs as much memory
        and time as a real one."""
        zeros, ones = torch.zeros_like(logprobs), torch.ones_like(logprobs)
        return cls(
            **responses.tensors(),
            **dict.fromkeys(("dense_rewards", "values", "kl", "rewards", "returns"), zeros),
            **dict.fromkeys(("advantages", "raw_advantages"), ones),
            **dict.fromkeys(("logprobs", "ref_logprobs"), logprobs),
            scores=zeros[:, 0],
            component_scores=zeros[:, :0],
            cut=~responses.finished,
            loss_mask=responses.response_mask,
        )


@torch.no_grad()
def collect(
    actors: Actors,
    prompts: Sequence[dict[str, Any]],
    key: Sequence[int],
    sampling: Sampling,
    ppo: PPOConfig,
    accelerator: Accelerator,
    minibatches: Sequence[Tensor] | None = None,
    with_scores: bool = True,
    with_values: bool = True,
    with_logprobs: bool = True,
) -> Rollout:
    """Sample a response to each prompt, score it, and read its tokens with all models. Every
    process returns the whole batch.

    Args:
        prompts: encoded prompts (`prompt`, `input_ids`), the same list on every process; their
            number is a multiple of the number of processes.
        key: names the random numbers, e.g. (seed, update).
        minibatches: rows of each minibatch of the first epoch. The models read the rollout in the
            same batches as training will, so that the first ratio is exactly 1.
        with_scores, with_values: call the scorer and the critic; else their fields are 0.
        with_logprobs: read the policy; else `logprobs` is 0 until the first epoch fills it in.
    """
    with accelerator.autocast():
        responses, scores = sample_and_score(
            actors, prompts, key, sampling, ppo, accelerator, with_scores
        )
        batches = minibatches or [torch.arange(len(responses), device=accelerator.device)]

        def read(function: Callable[[Responses], Tensor]) -> Tensor:
            return read_tokens(responses, batches, function, ppo, accelerator)

        logprobs, values = torch.zeros(2, *responses.response_ids.shape, device=accelerator.device)
        if with_logprobs:
            logprobs, values = read_policy(actors.reader, read, sampling)
        reference = actors.reference or actors.policy  # that with its adapters off
        with actors.in_use(reference) if actors.reference else actors.policy.disable_adapter():
            ref_logprobs = read(lambda part: policy_logprobs(reference, part, sampling)[0])
        if with_values and actors.critic is not None and not actors.shares_trunk:
            values = read(partial(critic_values, actors.critic))
    counted = responses.finished[:, None] | (not ppo.mask_truncated)
    return Rollout(
        **responses.tensors(),
        **scores,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        loss_mask=responses.response_mask & counted,
    )


def sample_and_score(
    actors: Actors,
    prompts: Sequence[dict[str, Any]],
    key: Sequence[int],
    sampling: Sampling,
    ppo: PPOConfig,
    accelerator: Accelerator,
    with_scores: bool,
) -> tuple[Responses, dict[str, Tensor]]:
    """Sample and score this process's share of the prompts; return the responses of all processes,
    and the fields of `Rollout` that come from the scorer."""
    num_rows = len(prompts) // accelerator.num_processes
    rows = range(num_rows * accelerator.process_index, num_rows * (accelerator.process_index + 1))
    mine = [prompts[row] for row in rows]
    noise = uniform_noise(key, rows, sampling.max_new_tokens)
    ids = [prompt["input_ids"] for prompt in mine]
    sample = partial(generate, actors.policy, ids, sampling, noise, ppo.rollout_batch_size)
    with phase("sampling"):
        engine_of(actors.policy).refresh()
        if with_scores and actors.score_group:
            sampled, score = score_while_sampling(actors, mine, sample)
        else:
            sampled = on_every_process(sample, accelerator)  # a server may fail one of them
            score = partial(score_sampled, actors, mine, sampled.ids)
    scores = Scores(torch.zeros(num_rows))
    if with_scores:
        with phase("scoring"):
            scores = on_every_process(score, accelerator)
    parts = [totals.tolist() for totals in scores.components.values()]
    found: dict[str, list[Any]] = {
        "scores": scores.total.tolist(),
        "dense_rewards": [row.tolist() for row in scores.dense or torch.zeros(num_rows, 0)],
        "component_scores": [[part[row] for part in parts] for row in range(num_rows)],
        "cut": [False] * num_rows if scores.cut is None else scores.cut.tolist(),
    }
    # every process pads the rows of all of them: the batch is the same everywhere
    sampled = Generation(**{name: gather_object(rows) for name, rows in vars(sampled).items()})
    found = {name: gather_object(rows) for name, rows in found.items()}
    all_ids, pad_id = [prompt["input_ids"] for prompt in prompts], actors.tokenizer.pad_token_id
    responses = Responses.padded(all_ids, sampled, pad_id, accelerator.device)
    width = responses.response_ids.shape[1]
    found["dense_rewards"] = [row + [0.0] * (width - len(row)) for row in found["dense_rewards"]]
    scored = {name: torch.tensor(rows, device=accelerator.device) for name, rows in found.items()}
    return responses, scored


def read_tokens(
    responses: Responses,
    minibatches: Sequence[Tensor],
    function: Callable[[Responses], Tensor],
    ppo: PPOConfig,
    accelerator: Accelerator,
) -> Tensor:
    """Apply a function of tokens to all responses; each process does its share of every minibatch.

    Returns:
        (B, T) float32, 0 where masked.
    """
    result = torch.zeros(responses.response_ids.shape, device=accelerator.device)
    for minibatch in minibatches:
        for rows in micro_batches(responses, minibatch, ppo, accelerator):
            part = responses.select(rows)
            width = part.response_ids.shape[1]
            result[rows, :width] = function(part).where(part.response_mask, 0.0)
    torch.clear_autocast_cache()  # rounded weights of one model at a time
    if accelerator.num_processes == 1:
        return result
    # the rows of the other processes are 0 here: a sum puts the shares together
    return accelerator.reduce(result, reduction="sum")


def micro_batches(
    responses: Responses, minibatch: Tensor, ppo: PPOConfig, accelerator: Accelerator
) -> list[Tensor]:
    """Rows of each forward pass of this process over its share of a minibatch, the longest first.

    Shares have similar numbers of tokens, and all processes make equally many passes.
    """
    lengths = responses.sequence_mask.sum(dim=1)
    order = minibatch[lengths[minibatch].argsort(descending=True, stable=True)]
    shares = [
        order[process :: accelerator.num_processes] for process in range(accelerator.num_processes)
    ]
    longest = int(lengths.max())
    sizes = [passes(lengths[share].tolist(), longest, ppo) for share in shares]
    while len(mine := sizes[accelerator.process_index]) < max(map(len, sizes)):
        largest = mine.index(max(mine))
        mine[largest : largest + 1] = [mine[largest] - mine[largest] // 2, mine[largest] // 2]
    return list(shares[accelerator.process_index].split(mine))


def passes(lengths: Sequence[int], longest: int, ppo: PPOConfig) -> list[int]:
    """Number of rows of each forward pass, for rows whose lengths descend.

    Args:
        longest: length of the longest row of the rollout.
    """
    sizes, start = [], 0
    while start < len(lengths):
        sizes.append(min(ppo.rows_of(lengths[start], longest), len(lengths) - start))
        start += sizes[-1]
    return sizes


def cut_metric(prefix: str, cut: Tensor, actors: Actors, *scorers: Scorer) -> dict[str, float]:
    """The metric `<prefix>cut_rate`: the share of responses that were cut for scoring.

    Empty if every reward model reads the ids of the policy: they fit into its context.
    """
    models = [model for scorer in scorers for model in reward_models(scorer)]
    if all(model.tokenizer_hash == actors.tokenizer_hash for model in models):
        return {}
    return {f"{prefix}cut_rate": float(cut.float().mean())}


def component_scores(rollout: Rollout, scorer: Scorer) -> dict[str, Tensor]:
    """Scores of each component, (B,), under the name of its metric: `score/<component>`."""
    columns = zip(component_names(scorer), rollout.component_scores.unbind(dim=1), strict=True)
    return {f"score/{name}": scores for name, scores in columns}


# --- The order of prompts and minibatches -------------------------------------------------------
# It is a function of seed and update, so that a resumed run needs no saved data position.


def stream_rows(numbers: Sequence[int], num_rows: int, key: Sequence[int]) -> list[int]:
    """Rows with these numbers in an endless stream, shuffled anew in every pass."""
    passes = {number // num_rows for number in numbers}
    orders = {p: np.random.default_rng([*key, p]).permutation(num_rows) for p in passes}
    return [int(orders[number // num_rows][number % num_rows]) for number in numbers]


def minibatches(ppo: PPOConfig, key: Sequence[int], device: torch.device) -> list[Tensor]:
    """Rows of each minibatch of an epoch, in an order that the key names: (seed, update, epoch)."""
    order = torch.from_numpy(np.random.default_rng([*key]).permutation(ppo.batch_size))
    return list(order.to(device).chunk(ppo.num_mini_batches))
