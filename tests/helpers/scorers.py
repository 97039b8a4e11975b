"""Tiny reward models as a reward stage leaves them, and scores to compare theirs with.

Expected scores come from transformers' own forward pass on ids that the reward model's tokenizer
renders.
"""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from rlhf.checkpoint import make_record, write_stage
from rlhf.config import ModelConfig, StageConfig
from rlhf.data import encode_prompt, encode_response
from rlhf.models import init_reward_model
from rlhf.scorers import Tokens
from rlhf.tokenizer import chat_template_text, load_tokenizer

PROMPTS = [
    [{"role": "user", "content": "name three animals"}],
    [{"role": "user", "content": "name two colours"}],
    [{"role": "user", "content": "name one fruit politely"}],
]
RESPONSES = ["dog cat horse .", "red blue .", "an apple thanks ."]
MEAN, STD = 0.5, 2.0
IDS = [[7, 8, 2], [9], [7, 9]]
TOKENS = Tokens([[1]] * 3, IDS, "")


def write_reward_model(directory: Path, tokenizer, seed: int, family="llama", **overrides) -> str:
    """A tiny reward model in the `final/` of a reward stage, with score statistics."""
    tiny_model(family, tokenizer, seed=seed, **overrides).save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")
    source = ModelConfig(path=str(directory / "base"))
    model = init_reward_model(source, load_tokenizer(source), seed)
    return write_stage_of(directory, model, load_tokenizer(source))


def write_stage_of(directory: Path, model, tokenizer) -> str:
    record = make_record("reward", StageConfig(), None, tokenizer)
    record.score_mean, record.score_std = MEAN, STD
    final = directory / "reward/final"
    write_stage(final, model, tokenizer, StageConfig(), record)
    return str(final)


def raw_scores(path: str, sequences) -> torch.Tensor:
    """Scores by transformers' own forward pass, one sequence at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[:, 0] for ids in sequences])


def rendered(tokenizer, prompts=PROMPTS, responses=RESPONSES) -> list[list[int]]:
    """Ids of conversations as this tokenizer's stages train on them."""
    pairs = zip(prompts, responses, strict=True)
    return [encode_prompt(p, tokenizer) + encode_response(p, r, tokenizer) for p, r in pairs]


def policy_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template_text("plain")
    return tokenizer


def num_words(prompts, responses):
    """Score by words."""
    return [len(response.split()) for response in responses]


def halves(prompts, responses, response_ids):
    """A tenth of each token's id."""
    return [[token / 10 for token in ids] for ids in response_ids]
