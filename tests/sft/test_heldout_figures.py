"""Figures of held-out rows are means over their tokens, however the rows are batched.

Run: python -m pytest tests/sft/test_heldout_figures.py
"""

from __future__ import annotations

import pytest
import torch
from helpers.stages import sft_config
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from rlhf import train_sft
from rlhf.config import ModelConfig
from rlhf.sft import stage


def by_hand(model, rows):
    """Mean loss and accuracy of the tokens with labels, one row after the other."""
    losses, hits = [], []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1][labels >= 0]
        losses += cross_entropy(logits, labels[labels >= 0], reduction="none").tolist()
        hits += (logits.argmax(-1) == labels[labels >= 0]).tolist()
    return sum(losses) / len(losses), sum(hits) / len(hits)


@pytest.mark.parametrize("forward", ["padded", "padding_free"])
def test_figures_of_heldout_rows_are_means_over_tokens(forward, tmp_path, monkeypatch):
    made = []
    plain = stage._make_trainer
    monkeypatch.setattr(stage, "_make_trainer", lambda *a: made.append(plain(*a)) or made[-1])
    for size in (1, 5, 32):
        config = sft_config(tmp_path / str(size), num_samples=0)
        config.dataset.max_eval_rows = 7
        config.model = ModelConfig(
            config=config.model.config, tokenizer=config.model.tokenizer, forward=forward
        )
        config.trainer |= {"max_steps": 2, "per_device_eval_batch_size": size}
        result = train_sft(config)
        model = AutoModelForCausalLM.from_pretrained(result.directory)
        rows = made[-1].eval_dataset
        loss, accuracy = by_hand(model, rows)
        assert len({len(row["input_ids"]) for row in rows}) > 1
        assert result.metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert result.metrics["eval_mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-5)
