"""One batch of experience: prompts, sampled responses, and what the models say about each token.

`collect` fills a `Rollout` on each process and gathers it, so that every process holds the whole
batch: whitening and statistics are global by construction, and a minibatch is the same whatever the
number of processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.config import InputError
from rlhf.data import pad
from rlhf.functional import token_logprobs
from rlhf.models import response_logits
from rlhf.sampling import Sampling, generate, uniform_noise
from rlhf.scorers import (
    Scorer,
    Scores,
    Tokens,
    component_names,
    reward_models,
    score_responses,
)
from rlhf.tokenizer import response_text

Result = TypeVar("Result")


@dataclass
class Rollout:
    """B prompts with one response each; P prompt tokens, T response tokens.

    Attributes:
        prompt_ids: (B, P) int64, left-padded.
        prompt_mask: (B, P) bool.
        response_ids: (B, T) int64, right-padded, the stop token or stop string included.
        response_mask: (B, T) bool; covers response tokens with what ends them.
        loss_mask: (B, T) bool; the response tokens that losses and whitening count: all of them, or
            with `ppo.mask_truncated` those of finished responses.
        finished: (B,) bool; True where a stop token or stop string was sampled.
        sampler_logprobs: (B, T) as the sampler saw them, nats.
        logprobs: (B, T) of the policy that sampled, by the training forward, nats.
        ref_logprobs: (B, T) of the reference, nats.
        values: (B, T) of the critic, at the state before each token; zeros without a critic.
        scores: (B,) normalised, with the sum of `dense_rewards` and the penalty for a missing EOS,
            unless `ppo.whiten_scores` puts it in later.
        dense_rewards: (B, T) that the scorer gave at the tokens; zeros for most scorers.
        component_scores: (B, C) of the scorer's C components, without the penalty; C is 0 for most.
        cut: (B,) bool; True where a reward model read only the beginning of the response.
        advantages, returns: (B, T), filled by the trainer.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    loss_mask: Tensor
    finished: Tensor
    sampler_logprobs: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    dense_rewards: Tensor
    component_scores: Tensor
    cut: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def sequence_ids(self) -> Tensor:
        """(B, L): prompt and response contiguous, right-padded to the longest row.

        prompt . . 1 2, response 3 4 . -> 1 2 3 4 . . . , cut to L
        """
        both = torch.cat([self.prompt_ids, self.response_ids], dim=1)  # (B, P + T)
        start = (~self.prompt_mask).sum(dim=1, keepdim=True)  # (B, 1)
        columns = torch.arange(self.sequence_mask.shape[1], device=both.device)
        # what would run over the end wraps into the padding before the prompt
        return both.gather(1, (start + columns) % both.shape[1])

    @property
    def sequence_mask(self) -> Tensor:
        """(B, L)."""
        lengths = self.prompt_mask.sum(dim=1) + self.lengths
        return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]

    @property
    def state_positions(self) -> Tensor:
        """(B, T): position in the sequence of the token before each response token; where that is
        masked, at most L - 1."""
        before = self.prompt_mask.sum(dim=1, keepdim=True) - 1  # (B, 1)
        steps = torch.arange(self.response_ids.shape[1], device=before.device)
        return (before + steps).clamp(max=self.sequence_mask.shape[1] - 1)

    @property
    def lengths(self) -> Tensor:
        """(B,) response tokens."""
        return self.response_mask.sum(dim=1)

    def __len__(self) -> int:
        return len(self.scores)

    def map(self, function: Any) -> Rollout:
        """Apply `function(name, tensor)` to every field."""
        values = {f.name: function(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)}
        return Rollout(**values)

    def select(self, rows: Tensor) -> Rollout:
        """Take some rows, and cut the padding that they do not need."""
        prompt_width = int(self.prompt_mask[rows].sum(dim=1).max())
        response_width = int(self.response_mask[rows].sum(dim=1).max())

        def take(name: str, tensor: Tensor) -> Tensor:
            tensor = tensor[rows]
            if tensor.dim() == 1 or name == "component_scores":
                return tensor
            return (
                tensor[:, -prompt_width:]
                if name.startswith("prompt")
                else tensor[:, :response_width]
            )

        return self.map(take)

    def micro_batches(self, size: int) -> Iterator[tuple[Tensor, Rollout]]:
        """Yield (rows, part) with `size` rows each, longest first, so that rows of a part have
        similar lengths."""
        order = self.sequence_mask.sum(dim=1).argsort(descending=True, stable=True)
        for rows in order.split(size):
            yield rows, self.select(rows)


@dataclass
class Actors:
    """The models of PPO.

    Attributes:
        policy: unwrapped causal LM, PEFT allowed.
        reference: frozen causal LM; None when the policy with its adapters off is the reference.
        critic: `ScalarModel`; None for estimators without one.
        scorer: see `rlhf.scorers`.
        tokenizer: of the policy.
        tokenizer_hash: `rlhf.tokenizer.hash_rendering` of it; a reward model with the same scores
            token ids directly.
    """

    policy: Any
    reference: Any
    critic: Any
    scorer: Scorer
    tokenizer: Any
    tokenizer_hash: str


@dataclass(frozen=True)
class CollectSettings:
    """How to collect: sampling, the penalty for a missing EOS (None: off), and batch sizes in
    sequences."""

    sampling: Sampling
    missing_eos_penalty: float | None
    rollout_batch_size: int
    micro_batch_size: int


@torch.no_grad()
def collect(
    actors: Actors,
    prompts: Sequence[dict[str, Any]],
    key: Sequence[int],
    settings: CollectSettings,
    accelerator: Accelerator,
    minibatches: Sequence[Tensor] | None = None,
    with_values: bool = True,
) -> Rollout:
    """Sample a response to each prompt and evaluate it; every process returns the whole batch.

    Args:
        prompts: encoded prompts (`prompt`, `input_ids`), the same list on every process; their
            number is a multiple of the number of processes.
        key: names the random numbers, e.g. (seed, update).
        minibatches: rows of each minibatch of the first epoch. The models read the rollout in the
            same batches as training will, so that the first ratio is exactly 1.
        with_values: also fill `values`, where there is a critic.
    """
    per_process = len(prompts) // accelerator.num_processes
    first = accelerator.process_index * per_process
    rows = range(first, first + per_process)
    mine = [prompts[row] for row in rows]
    sampling = settings.sampling
    noise = uniform_noise(key, rows, sampling.max_new_tokens)
    with accelerator.autocast():
        sampled = generate(
            actors.policy,
            [p["input_ids"] for p in mine],
            sampling,
            noise,
            settings.rollout_batch_size,
        )
        rollout = _assemble(mine, sampled, actors.tokenizer.pad_token_id, accelerator.device)
        score = partial(score_sampled, actors, mine, sampled.ids, sampled.finished, settings)
        _fill_scores(rollout, on_every_process(score, accelerator))
        rollout = _gather(rollout, accelerator)
        everything = [torch.arange(len(rollout), device=accelerator.device)]
        _fill_token_values(
            rollout, actors, settings, accelerator, minibatches or everything, with_values
        )
    return rollout


def policy_logprobs(model: Any, part: Rollout, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Log-probs of the response tokens by the training forward.

    Returns:
        logprobs (B, T) float32, and the logits (B, T, V) they come from.
    """
    logits = response_logits(
        model, part.sequence_ids, part.sequence_mask, part.state_positions, sampling.forbidden
    )
    return token_logprobs(logits, part.response_ids, sampling.temperature), logits


def critic_values(critic: Any, part: Rollout) -> Tensor:
    """Value of the state before each response token, (B, T) float32."""
    return critic(part.sequence_ids, part.sequence_mask).gather(1, part.state_positions)


def score_sampled(
    actors: Actors,
    prompts: Sequence[dict[str, Any]],
    responses: list[list[int]],
    finished: list[bool],
    settings: CollectSettings,
) -> Scores:
    """Score sampled responses, on the CPU.

    The penalty for a missing EOS takes the place of the score of a response that neither EOS nor a
    stop string ends (N, N+); rewards that a scorer gave at the tokens stay, so that the total is
    then their sum plus the penalty.
    """
    tokens = Tokens([p["input_ids"] for p in prompts], responses, actors.tokenizer_hash)
    asked = [p["prompt"] for p in prompts]
    pairs = zip(responses, asked, strict=True)
    texts = [response_text(ids, actors.tokenizer, prompt) for ids, prompt in pairs]
    scores = score_responses(actors.scorer, asked, texts, "the scorer", tokens)
    if settings.missing_eos_penalty is not None:
        penalised = settings.missing_eos_penalty + scores.dense_total
        scores.total = torch.where(torch.tensor(finished), scores.total, penalised)
    return scores


def on_every_process(task: Callable[[], Result], accelerator: Accelerator) -> Result:
    """Run a task; where bad input ends it on one process, it ends on all of them.

    Otherwise the other processes would wait for the failed one, and none could save.

    Raises:
        InputError: that of the first process that failed, with its number.
    """
    error: InputError | None = None
    try:
        result = task()
    except InputError as caught:
        error = caught
    if accelerator.num_processes == 1:
        if error is not None:
            raise error
        return result
    messages = gather_object([None if error is None else str(error)])
    for rank, message in enumerate(messages):
        if message is not None:
            raise InputError(f"rank {rank}: {message}") from error
    return result


def cut_metric(prefix: str, cut: Tensor, actors: Actors, *scorers: Scorer) -> dict[str, float]:
    """Share of responses that are cut for scoring, as a metric; empty where every reward model
    reads the ids that the policy sampled, for which their context has room.

    Args:
        prefix: of the name `cut_rate`.
        cut: (B,) bool, as the scorers said.
    """
    models = [model for scorer in scorers for model in reward_models(scorer)]
    if all(model.tokenizer_hash == actors.tokenizer_hash for model in models):
        return {}
    return {f"{prefix}cut_rate": float(cut.float().mean())}


def component_scores(rollout: Rollout, scorer: Scorer) -> dict[str, Tensor]:
    """Scores by component, each (B,), under their names as metrics: `score/<component>`."""
    columns = rollout.component_scores.unbind(dim=1)
    return {f"score/{n}": c for n, c in zip(component_names(scorer), columns, strict=True)}


def _fill_scores(rollout: Rollout, scores: Scores) -> None:
    device = rollout.scores.device
    rollout.scores = scores.total.to(device)
    if scores.dense is not None:
        rollout.dense_rewards = pad_sequence(scores.dense, batch_first=True).to(device)
    if scores.components:
        rollout.component_scores = torch.stack([*scores.components.values()], dim=1).to(device)
    if scores.cut is not None:
        rollout.cut = scores.cut.to(device)


def _assemble(
    prompts: Sequence[dict[str, Any]], sampled: Any, pad_id: int, device: torch.device
) -> Rollout:
    """Pad prompts on the left and responses on the right."""
    prompt_rows = [p["input_ids"] for p in prompts]
    response_mask = pad([[True] * len(row) for row in sampled.ids], False, device=device)
    empty = torch.zeros(response_mask.shape, device=device)
    return Rollout(
        prompt_ids=pad(prompt_rows, pad_id, side="left", device=device),
        prompt_mask=pad([[True] * len(row) for row in prompt_rows], False, "left", device),
        response_ids=pad(sampled.ids, pad_id, device=device),
        response_mask=response_mask,
        loss_mask=response_mask.clone(),
        finished=torch.tensor(sampled.finished, device=device),
        sampler_logprobs=pad(sampled.logprobs, 0.0, device=device),
        logprobs=empty.clone(),
        ref_logprobs=empty.clone(),
        values=empty.clone(),
        scores=torch.zeros(len(prompts), device=device),
        dense_rewards=empty.clone(),
        component_scores=torch.zeros(len(prompts), 0, device=device),
        cut=torch.zeros(len(prompts), dtype=torch.bool, device=device),
        advantages=empty.clone(),
        returns=empty.clone(),
    )


def _fill_token_values(
    rollout: Rollout,
    actors: Actors,
    settings: CollectSettings,
    accelerator: Accelerator,
    minibatches: Sequence[Tensor],
    with_values: bool,
) -> None:
    """Fill log-probs and values of the whole rollout, each process reading its share of every
    minibatch."""
    filled = ["logprobs", "ref_logprobs"]
    if with_values and actors.critic is not None:
        filled.append("values")
    adapters_off = (
        nullcontext() if actors.reference is not None else actors.policy.disable_adapter()
    )
    reference = actors.reference if actors.reference is not None else actors.policy

    def read(name: str, part: Rollout) -> Tensor:
        if name == "values":
            return critic_values(actors.critic, part)
        model = actors.policy if name == "logprobs" else reference
        return policy_logprobs(model, part, settings.sampling)[0]

    for name in filled:
        target = getattr(rollout, name)
        with adapters_off if name == "ref_logprobs" else nullcontext():
            for minibatch in minibatches:
                mine = share_of(minibatch, accelerator)
                for rows, part in rollout.select(mine).micro_batches(settings.micro_batch_size):
                    width = part.response_ids.shape[1]
                    target[mine[rows], :width] = read(name, part).where(part.response_mask, 0.0)
        if accelerator.num_processes > 1:
            # the rows of the others are 0 here: a sum puts the shares together
            setattr(rollout, name, accelerator.reduce(target, reduction="sum"))


def share_of(minibatch: Tensor, accelerator: Accelerator) -> Tensor:
    """Rows of a minibatch that this process reads."""
    return minibatch[accelerator.process_index :: accelerator.num_processes]


def _gather(rollout: Rollout, accelerator: Accelerator) -> Rollout:
    if accelerator.num_processes == 1:
        return rollout

    def share(name: str, tensor: Tensor) -> Tensor:
        if not tensor.numel():  # no components: there is nothing to exchange
            return tensor.new_zeros(len(tensor) * accelerator.num_processes, 0)
        if tensor.dim() == 2:
            # only the processes that pad get an int64 for a bool back
            tensor = accelerator.pad_across_processes(
                tensor, dim=1, pad_first=name.startswith("prompt")
            ).to(tensor.dtype)
        return accelerator.gather(tensor)

    return rollout.map(share)
