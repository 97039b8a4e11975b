"""Padding of every forward pass: no query without a key, and no number that depends on it.

Where a mask leaves a query no key, cuDNN's attention gives NaN gradients at lengths that are
multiples of 64 (tests/gpu/test_attention.py). So rows are right-padded in training and scoring, and
causal models get no mask. The families' contract is in test_families.py.
Run: pytest tests/models/test_padding.py
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict

import pytest
import torch
from helpers.families import (
    LORA,
    SEQUENCES,
    TOKENIZER,
    close,
    exact,
    near,
    padded,
    positions_before_last,
    response_logits,
    rollout_of,
)
from helpers.stages import WORLD, ppo_config, reward_config, sft_config
from helpers.tiny import FAMILIES, tiny_model
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf import train_ppo, train_reward, train_sft
from rlhf.config import ModelConfig, PPOConfig, PtxConfig
from rlhf.demo.world import MODEL_CONFIG
from rlhf.models import (
    ScalarModel,
    add_lora,
    forward_inputs,
    is_causal,
    prefill_inputs,
    sequence_scores,
)
from rlhf.scorers import score_sequences

NONE_FORBIDDEN = torch.empty(0, dtype=torch.long)


# --- Every forward pass of the three stages -------------------------------------------------------


class Attention:
    """Watches every call of attention; counts layers that read a batch, by whether they train."""

    def __init__(self, monkeypatch):
        self.layers = defaultdict(set)  # with gradient or not -> layers
        self.bad: set[str] = set()
        self.attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        mapping = ALL_ATTENTION_FUNCTIONS._local_mapping
        monkeypatch.setitem(mapping, "sdpa", self)

    def __call__(self, module, query, key, value, attention_mask, **keywords):
        if not self.in_sampler():
            self.layers[torch.is_grad_enabled()].add(module)
            if attention_mask is not None and without_key(attention_mask).any():
                grad = "with" if torch.is_grad_enabled() else "without"
                self.bad.add(f"{type(module).__name__}, {grad} gradient")
        return self.attend(module, query, key, value, attention_mask, **keywords)

    @staticmethod
    def in_sampler() -> bool:
        """True in `generate`, where rows are left-padded."""
        frame = sys._getframe()
        while frame is not None:
            if frame.f_code.co_name == "generate" and "rlhf" in frame.f_code.co_filename:
                return True
            frame = frame.f_back
        return False


def without_key(mask):
    """Queries that see no key, by a mask of bools or of numbers that are added."""
    return ~(mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).any(-1)


def test_no_query_is_without_a_key_in_any_forward_of_the_three_stages(tmp_path, monkeypatch):
    """Training, evaluation, scoring, the preflight and PPO-ptx; the sampler is left out.

    Rows are padded. The window of the model is shorter than the padding of most rows.
    """
    values = MODEL_CONFIG | {"hidden_size": 32, "intermediate_size": 64}
    values |= {"model_type": "mistral", "sliding_window": 3}
    source = ModelConfig(config=values, tokenizer="python:rlhf.demo.world.build_tokenizer")
    rows = dataclasses.replace(WORLD, max_rows=64, max_eval_rows=8)
    layers, few = values["num_hidden_layers"], {"max_steps": 2, "logging_steps": 1, "eval_steps": 1}
    watched = Attention(monkeypatch)
    config = sft_config(tmp_path, model=source, dataset=rows)
    config.model.forward = "padded"
    config.trainer |= few
    train_sft(config)
    assert not watched.bad
    assert [len(watched.layers[grad]) for grad in (True, False)] == [layers, layers]

    watched.layers.clear()
    config = reward_config(tmp_path, dataset=rows)
    config.model.forward = "padded"
    config.trainer |= few
    train_reward(config)
    assert not watched.bad
    assert [len(watched.layers[grad]) for grad in (True, False)] == [layers, layers]

    watched.layers.clear()
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "apple"}\n{"text": "apple river stone apple river"}\n')
    ppo = PPOConfig(num_updates=1, num_ppo_epochs=1, batch_size=16, response_length=8)
    ppo.missing_eos_penalty = None  # after two steps of SFT few responses end
    ptx = PtxConfig(coef=1.0, path=str(texts), batch_size=2, max_length=32)
    config = ppo_config(tmp_path, preflight=True, dataset=rows, ppo=ppo, ptx=ptx)
    config.model.forward = "padded"
    train_ppo(config)
    assert not watched.bad
    # policy, critic, and the reward model while it is loaded; the reference without gradient too
    assert [len(watched.layers[grad]) for grad in (True, False)] == [3 * layers, 4 * layers]


def test_the_watch_sees_a_query_without_a_key(monkeypatch):
    watched = Attention(monkeypatch)
    model = tiny_model("mistral_window", TOKENIZER)
    for side, family in (("right", "mistral_window"), ("left", "llama")):
        ids, mask = padded([[5, 6], list(range(20, 32))], side)
        model = tiny_model(family, TOKENIZER)
        model(**prefill_inputs(model, ids, mask))
        assert watched.bad
        watched.bad.clear()
        model(input_ids=ids)
        assert not watched.bad


# --- Which models get a mask ----------------------------------------------------------------------

ALIBI = {
    "falcon_alibi": ("falcon", {"alibi": True, "new_decoder_architecture": False}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
}


@pytest.mark.parametrize("family", [*FAMILIES, *ALIBI])
def test_a_decoder_gets_no_mask_whatever_wraps_it(family, monkeypatch):
    for name, values in ALIBI.items():
        monkeypatch.setitem(FAMILIES, name, values)
    ids, mask = padded(SEQUENCES, "right")
    for model in (tiny_model(family, TOKENIZER), tiny_model(family, TOKENIZER).base_model):
        assert is_causal(model) and forward_inputs(model, ids, mask).keys() == {"input_ids"}
    assert is_causal(add_lora(tiny_model(family, TOKENIZER), LORA, "CAUSAL_LM", seed=0))


@pytest.mark.parametrize("family", ALIBI)
def test_attention_that_reads_positions_from_the_mask_gives_the_same_without(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, ALIBI[family])
    model = tiny_model(family, TOKENIZER)
    ids, mask = padded(SEQUENCES, "right", fill=77)
    every = positions_before_last(ids, ids.shape[1] - 1)
    left, left_mask = padded(SEQUENCES, "left", fill=77)
    with torch.no_grad():
        batch = response_logits(model, ids, mask, every, NONE_FORBIDDEN)
        sampler = model(**prefill_inputs(model, left, left_mask)).logits
        for row, sequence in enumerate(SEQUENCES):
            alone = model(torch.tensor([sequence])).logits[0]
            near(batch[row, : len(sequence) - 1], alone[:-1])
            near(sampler[row, -len(sequence) :], alone)


ENCODERS = {"bert": {}, "roberta": {"pad_token_id": 1, "max_position_embeddings": 66}}


def tiny_encoder(model_type, **values):
    """A one-label classifier of two layers whose tokens see later ones."""
    values |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "vocab_size": 320, "num_labels": 1}
    config = AutoConfig.for_model(model_type, **values)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_encoder_gets_the_mask_and_scores_as_without_padding(model_type, monkeypatch):
    watched = Attention(monkeypatch)
    model = tiny_encoder(model_type, **ENCODERS[model_type])
    inner = model.base_model
    assert not is_causal(inner)
    model.score = torch.nn.Linear(32, 1)
    scores = score_sequences(ScalarModel(model), SEQUENCES, batch_size=8)
    for sequence, score in zip(SEQUENCES, scores, strict=True):
        with torch.no_grad():
            hidden = inner(input_ids=torch.tensor([sequence])).last_hidden_state[0, -1]
        close(score, model.score(hidden)[0], atol=1e-5)
    assert watched.layers and not watched.bad


# --- Rows of a rollout ----------------------------------------------------------------------------


def test_prompt_and_response_of_a_rollout_are_contiguous_and_right_padded():
    rollout = rollout_of([[5, 6, 7], [8]], [[11], [12, 13, 14]], fill=0)
    exact(rollout.prompt_ids, torch.tensor([[5, 6, 7], [0, 0, 8]]))
    exact(rollout.sequence_ids, torch.tensor([[5, 6, 7, 11], [8, 12, 13, 14]]))
    assert rollout.sequence_mask.all()
    exact(rollout.state_positions, torch.tensor([[2, 3, 3], [0, 1, 2]]))
    rollout = rollout_of([[5, 6, 7], [8]], [[11, 12], [13]], fill=0)
    exact(rollout.sequence_ids, torch.tensor([[5, 6, 7, 11, 12], [8, 13, 0, 0, 0]]))
    exact(rollout.sequence_mask.sum(dim=1), torch.tensor([5, 2]))
    exact(rollout.select(torch.tensor([1])).sequence_ids, torch.tensor([[8, 13]]))


def test_rows_that_start_with_padding_are_refused_where_a_model_trains_or_scores():
    ids, mask = padded(SEQUENCES, "left")
    model = tiny_model("llama", TOKENIZER)
    with pytest.raises(ValueError, match="must be right-padded"):
        sequence_scores(ScalarModel(model), ids, mask)
    with pytest.raises(ValueError, match="must be right-padded"):
        response_logits(model, ids, mask, positions_before_last(ids, 2), NONE_FORBIDDEN)
