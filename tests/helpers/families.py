"""What the contract tests of models share: sequences, padding, saving, training a few steps."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import FAMILIES, tiny_tokenizer
from torch.testing import assert_close

from rlhf.checkpoint import make_record, write_stage
from rlhf.config import ModelConfig, PeftConfig, StageConfig
from rlhf.models import ScalarModel, by_row, forward_inputs, sequence_scores
from rlhf.ppo.rollout import Responses
from rlhf.sampling import Generation
from rlhf.scorers import score_sequences

TOKENIZER = tiny_tokenizer()
PAD, EOS, VOCAB = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, len(TOKENIZER)
PROMPTS = [[40, 41, 42, 43, 44], [50], [60, 61, 62]]
# Sequences of 7, 6 and 9 tokens: each needs other padding, on either side.
RESPONSES = [[101, 102], [103, 104, 105, 106, 107], [109, 110, 111, 112, 113, EOS]]
SEQUENCES = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
NONE_FORBIDDEN = torch.empty(0, dtype=torch.long)
LORA = PeftConfig(enabled=True, r=4, alpha=8)


def exact(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def close(actual, expected, atol=1e-6):
    assert_close(actual, expected, rtol=1e-5, atol=atol)


def near(actual, expected):
    """Equal to rounding: of the largest number, as that of a sum is of its largest terms."""
    close(actual, expected, atol=1e-5 * max(1.0, float(expected.abs().max())))


def save(directory, model, stage="sft", tokenizer=TOKENIZER, **record_values):
    """Write a stage directory and return the ModelConfig that loads it by path alone."""
    record = make_record(stage, StageConfig(), None, tokenizer)
    for name, value in record_values.items():
        setattr(record, name, value)
    write_stage(directory, model, tokenizer, StageConfig(), record)
    return ModelConfig(path=str(directory))


def padded(sequences, side, fill=PAD):
    width = max(map(len, sequences))
    ids, mask = [], []
    for sequence in sequences:
        gap = width - len(sequence)
        before = gap if side == "left" else 0
        ids.append([fill] * before + sequence + [fill] * (gap - before))
        mask.append([False] * before + [True] * len(sequence) + [False] * (gap - before))
    return torch.tensor(ids), torch.tensor(mask)


def positions_before_last(ids, num):
    """Positions of the tokens that predict the last `num` of each row, (B, num)."""
    width = ids.shape[1]
    return torch.arange(width - num - 1, width - 1).expand(len(ids), -1)


def response_logits(model, ids, mask, positions, forbidden):
    """All logits of a training forward pass, those of `positions` taken: (B, T, V)."""
    logits = by_row(model(**forward_inputs(model, ids, mask), use_cache=False).logits, mask)
    logits = logits[torch.arange(len(ids))[:, None], positions]
    return logits.index_fill(-1, forbidden, -torch.inf)


@torch.no_grad()
def logits_of(model, ids=SEQUENCES[0]):
    return model(input_ids=torch.tensor([ids])).logits


@torch.no_grad()
def scores_of(model, sequences=SEQUENCES):
    return score_sequences(ScalarModel(model).eval(), sequences, batch_size=8)


def rollout_of(prompts, responses, fill=PAD):
    sampled = Generation(responses, [[0.0] * len(r) for r in responses], [True] * len(responses))
    return Responses.padded(prompts, sampled, fill, torch.device("cpu"))


def train_policy(model, num_steps=3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    ids = torch.tensor([SEQUENCES[0]])
    for _ in range(num_steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_scores(model, num_steps=3):
    scalar = ScalarModel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids, mask = padded(SEQUENCES, "right")
    for _ in range(num_steps):
        loss = (sequence_scores(scalar, ids, mask) - torch.tensor([1.0, -1.0, 2.0])).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


every_family = pytest.mark.parametrize("family", FAMILIES)
BLOCKS = {
    "llama": "LlamaDecoderLayer",
    "gpt_neox": "GPTNeoXLayer",
    "gptj": "GPTJBlock",
    "falcon_7b": "FalconDecoderLayer",
    "falcon_40b": "FalconDecoderLayer",
    "opt": "OPTDecoderLayer",
    "gpt2": "GPT2Block",
    "qwen3": "Qwen3DecoderLayer",
    "mistral": "MistralDecoderLayer",
    "mistral_window": "MistralDecoderLayer",
    "gemma": "GemmaDecoderLayer",
    "gemma2": "Gemma2DecoderLayer",
    "gemma3": "Gemma3DecoderLayer",
}
