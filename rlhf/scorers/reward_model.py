"""Trained reward models as scorers: loading, rendering, scoring, normalising.

Left out: training them (`rlhf.reward`), and several of them as one (`rlhf.scorers.combined`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from rlhf.checkpoint import require_stage
from rlhf.config import InputError, ModelConfig, ScorerConfig
from rlhf.console import warn
from rlhf.data import encode_prompt, encode_response, pad
from rlhf.distributed import compute_device, move
from rlhf.equivalence import choose_forward, require_padding, tolerance
from rlhf.hub import is_hub_id
from rlhf.models import (
    ScalarModel,
    TextModel,
    freeze,
    has_linear_head,
    load_reward_model,
    sequence_scores,
    unwrap_peft,
)
from rlhf.sampling import context_length
from rlhf.scorers.call import BuiltInScorer, Columns, Scores, Tokens, require_valid_scores
from rlhf.tokenizer import (
    RefusedConversation,
    first_token_ids,
    hash_rendering,
    load_tokenizer,
    read_tokenizer,
)


class RewardModelScorer(BuiltInScorer):
    """A trained reward model; the statistics that its stage stored normalise its scores.

    A model with a linear head is read at the last token of prompt and response. Any other model
    (BERT, DeBERTa) scores texts by its own forward pass: prompt and response are the two texts of a
    pair, which its tokenizer joins. Its tokenizer's own chat template renders messages; without a
    template their contents follow one another.

    Attributes:
        path: directory or Hub id.
        scores_texts: the model has no linear head, and so no value at each token.
        tokenizer: of the reward model; it renders text, with its chat template.
        tokenizer_hash: see `hash_rendering`; a policy with the same hash is scored by token ids.
            None where the model scores texts.
        max_length: longest prompt with response, tokens.
        forward: how it reads rows, see `choose_forward`.
    """

    def __init__(
        self,
        config: ScorerConfig,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        field: str = "scorer.path",
        trust_remote_code: bool = False,
        load: Callable[[ModelConfig, str], Any] | None = None,
    ):
        """Load the model, its tokenizer and its score statistics.

        Args:
            config: `path` is the `final/` of a reward stage, or any one-label sequence classifier.
            field: configuration key of `path`, for messages.
            trust_remote_code: whether Python files of the model may run.
            load: (model settings, field) -> the model; None reads a whole one.

        Raises:
            InputError: not a reward model, or without the statistics that `normalize` needs.
        """
        assert config.path is not None
        record = require_stage(config.path, ("reward",), field)
        mean, std = score_statistics(config, record, field)
        source = ModelConfig(path=config.path, dtype=dtype, trust_remote_code=trust_remote_code)
        model = (load or partial(load_reward_model, encoders=True))(source, field)
        self.scores_texts = not has_linear_head(model)
        scalar: Any = TextModel if self.scores_texts else ScalarModel
        self.model = freeze(scalar(model, mean, std))
        move(self.model, device)
        self.max_length = context_length(model)
        if self.scores_texts:
            self.tokenizer, self.tokenizer_hash = _own_tokenizer(model, source, field), None
            bos = first_token_ids("", self.tokenizer)  # chat templates may write it, too
            self._added_bos = self.tokenizer.bos_token if bos else ""
            self.max_length -= _num_reserved_positions(model)
        else:
            self.tokenizer = load_tokenizer(source, field)
            self.tokenizer_hash = hash_rendering(self.tokenizer)
        self.path, self.batch_size = config.path, config.batch_size
        self._prompts = None if record is None else record.prompts
        where, fix = f"{field}={config.path}", "take a reward model of another family"
        require_padding(self.model, self.tokenizer, where, fix)
        self.forward = choose_forward(self.model, self.tokenizer)
        written = type(unwrap_peft(model)).__module__
        if not (self.scores_texts or written.startswith("transformers.")):
            self._require_own_scores(where)

    def score(
        self, prompts: Any, responses: Any, field: str, tokens: Tokens | None, columns: Columns
    ) -> Scores:
        """Score token ids where this model renders conversations as their tokenizer does, else the
        text of complete responses. The end of a response is cut where it exceeds the context.

        Raises:
            InputError: a prompt leaves no room for a response.
        """
        self._warn_about_prompts(prompts)
        pairs = list(zip(prompts, responses, strict=True))
        if self.scores_texts:
            prompt_lengths = [self.prompt_length(prompt) for prompt in prompts]
            lengths = [len(self.encode(*pair)) for pair in pairs]
        else:
            if tokens is not None and tokens.rendering == self.tokenizer_hash:
                encoded: list[Any] = list(zip(tokens.prompts, tokens.responses, strict=True))
            else:
                encoded = [self.encode_pair(*pair) for pair in pairs]
            prompt_lengths = [len(prompt) for prompt, _ in encoded]
            lengths = [len(prompt) + len(response) for prompt, response in encoded]
        longest = max(prompt_lengths, default=0)
        if longest >= self.max_length:
            raise InputError(
                f"a prompt has {longest} tokens, which leaves no room for a response in the "
                f"context of {self.max_length} tokens of the reward model {self.path}; drop it, or "
                "use a reward model with a longer context"
            )
        if self.scores_texts:
            scores = self._score_texts([self._texts(*pair) for pair in pairs])
        else:
            sequences = [[*prompt, *response][: self.max_length] for prompt, response in encoded]
            scores = score_sequences(self.model, sequences, self.batch_size)
        cut = torch.tensor([length > self.max_length for length in lengths])
        return Scores(require_valid_scores(scores, responses, field), cut=cut)

    def _warn_about_prompts(self, prompts: Sequence[Any]) -> None:
        """Warn, once, about prompts of a form that the model was not trained on."""
        form = "text" if all(isinstance(prompt, str) for prompt in prompts) else "conversation"
        if not prompts or self._prompts in (None, "mixed", form):
            return
        warn(
            f"the reward model {self.path} was trained on {self._prompts} prompts, but these are "
            f"{form} prompts, which it has never seen; give the prompts "
            + ("as text" if form == "conversation" else "as messages of {role, content}")
        )
        self._prompts = None

    def encode(self, prompt: Any, response: str) -> list[int]:
        """Token ids of a prompt (text or messages) and a complete response, as in training."""
        if self.scores_texts:
            return self.tokenizer(*self._texts(prompt, response), verbose=False)["input_ids"]
        prompt_ids, response_ids = self.encode_pair(prompt, response)
        return prompt_ids + response_ids

    def encode_pair(self, prompt: Any, response: str) -> tuple[list[int], list[int]]:
        """As `encode`, prompt and response apart. If the chat template leaves out the whole
        response, for example one of thoughts alone, the model reads an empty answer."""
        prompt_ids = encode_prompt(prompt, self.tokenizer)
        try:
            return prompt_ids, encode_response(prompt, response, self.tokenizer)
        except RefusedConversation:
            return prompt_ids, encode_response(prompt, "", self.tokenizer)

    @torch.no_grad()
    def _require_own_scores(self, where: str) -> None:
        """Refuse a model whose own code makes scores in another way than by its head at the last
        token."""
        model, device = self.model.model, compute_device(self.model)
        rows = [self.encode("Hi", text) for text in ("Yes.", "No, not at all.", "What for?")]
        # its head is float32 here, as layers of any type may be below it
        with torch.autocast(device.type, model.dtype, enabled=model.dtype != torch.float32):
            ids = (torch.tensor([row], device=device) for row in rows)
            raw = [model(input_ids=row).logits.view(-1) for row in ids]
        own = torch.cat(raw).float().cpu()
        ours = score_sequences(self.model, rows, 1) * self.model.std + self.model.mean
        if not (own - ours).abs().max() <= tolerance(model) * own.abs().max().clamp(min=1e-3):
            raise InputError(
                f"{where}: the code of {type(model).__name__} gives other scores than its linear "
                f"head at the last token ({own[0]:.4g} and {ours[0]:.4g} for the same text); write "
                "a Python scorer that calls the model: scorer=python scorer.path=my_scorer.score"
            )

    def prompt_length(self, prompt: Any) -> int:
        """Tokens of a prompt with the template around it, without those of a response."""
        if self.scores_texts:
            return len(self.encode(prompt, ""))
        return len(encode_prompt(prompt, self.tokenizer))

    def _texts(self, prompt: Any, response: str) -> tuple[str, ...]:
        """Return the input of the model's own tokenizer: a pair of texts, or one rendered text."""
        if isinstance(prompt, str):
            return prompt, response
        if self.tokenizer.chat_template is not None:
            messages = [*prompt, {"role": "assistant", "content": response}]
            try:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            except TemplateError as error:
                what = f"the chat template of {self.path} refuses: {error}"
                raise RefusedConversation(what) from error
            return (text.removeprefix(self._added_bos),)
        return "\n\n".join(message["content"] for message in prompt), response

    @torch.no_grad()
    def _score_texts(self, rows: Sequence[Sequence[str]]) -> Tensor:
        """Score texts by the model's own forward pass, (B,) float32 on the CPU."""
        device, scores = next(self.model.parameters()).device, torch.zeros(len(rows))
        for chosen in _batches([sum(map(len, row)) for row in rows], self.batch_size):
            columns = [list(texts) for texts in zip(*(rows[i] for i in chosen), strict=True)]
            inputs = self.tokenizer(
                *columns,
                padding=True,
                padding_side="right",
                truncation="only_second" if len(columns) == 2 else True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(device)
            scores[chosen] = self.model(inputs).cpu()
        return scores


def _own_tokenizer(model: Any, source: ModelConfig, field: str) -> Any:
    """The tokenizer of a model that scores texts, with the pad token that the model knows."""
    tokenizer = read_tokenizer(source, field)
    tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:
        pad = model.config.pad_token_id
        pad = tokenizer.eos_token_id if pad is None else pad
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer


def _num_reserved_positions(model: Any) -> int:
    """Rows of the position table that no token uses: RoBERTa's positions begin after the padding's.

    max_position_embeddings 514, padding 1 -> positions 2 to 513, 512 tokens
    """
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    padding = [getattr(table, "padding_idx", None) for table in tables]
    return max((index + 1 for index in padding if index is not None), default=0)


@torch.no_grad()
def score_sequences(model: Any, sequences: Sequence[Sequence[int]], batch_size: int) -> Tensor:
    """Score token sequences with a `ScalarModel` in batches of similar length, (B,) float32 on the
    CPU, in the order given."""
    device, scores = compute_device(model), torch.zeros(len(sequences))
    for rows in _batches([len(sequence) for sequence in sequences], batch_size):
        ids = pad([sequences[i] for i in rows], 0, device=device)
        mask = pad([[True] * len(sequences[i]) for i in rows], False, device=device)
        scores[rows] = sequence_scores(model, ids, mask).cpu()
    return scores


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of rows in batches of similar length, the shortest first."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def score_statistics(
    config: ScorerConfig, record: Any, field: str = "scorer.path"
) -> tuple[float, float]:
    """Return (mean, std) to normalise with: score = (raw - mean) / std.

    `demo_mean_zero` subtracts the mean score of the completions that the reward stage chose (see
    `rlhf.reward.completions`), `standardise` also divides by their standard deviation.

    Args:
        record: `StageRecord` of the reward model, None where no stage wrote it.
        field: configuration key of `path`, for messages.
    """
    if config.normalize == "none":
        return 0.0, 1.0
    if record is None or record.score_mean is None:
        key = field.removesuffix("path") + "normalize"
        exists = Path(str(config.path)).is_dir() or is_hub_id(str(config.path))
        what = "has none" if exists else "is no directory here"
        raise InputError(
            f"{key}={config.normalize} needs the score statistics that the reward stage stores, "
            f"but {config.path} {what}; for a model from elsewhere set {key}=none"
        )
    mean, std = record.score_mean, record.score_std or 1.0
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise InputError(
            f"{field}={config.path}: its rlhf.json has score_mean={mean} and score_std={std}, but "
            "scores are divided by a positive number: correct them there"
        )
    return mean, std if config.normalize == "standardise" else 1.0
