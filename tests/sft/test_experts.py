"""SFT of a mixture of experts: its answers are sampled after training, and final/ can be used.

Run: python -m pytest tests/sft/test_experts.py
"""

import json

import torch
from helpers.tiny import tiny_tokenizer
from helpers.tiny_sft import sft_config
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf import train_sft
from rlhf.config import ModelConfig
from rlhf.equivalence import require_cache
from rlhf.models import load_policy

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}


def write_experts(directory, **values):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    own = {"vocab_size": len(tokenizer), "num_local_experts": 4, "initializer_range": 0.3}
    config = AutoConfig.for_model("mixtral", **SIZES, **own, **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return ModelConfig(path=str(directory))


def test_experts_are_balanced_while_they_train_and_answer_afterwards(tmp_path):
    losses = {}
    for coefficient in (0.0, 0.5):
        config = sft_config(tmp_path, f"run{coefficient}", 2)
        config.model = write_experts(tmp_path / "model")
        config.dataset.max_length, config.num_samples, config.response_length = 64, 3, 4
        config.trainer |= {"router_aux_loss_coef": coefficient, "logging_steps": 1}
        result = train_sft(config)
        assert len(result.samples) == 3
        losses[coefficient] = next(row["loss"] for row in result.metrics if "loss" in row)
        settings = json.loads((result.directory / "config.json").read_text())
        assert settings["output_router_logits"] is False
    assert losses[0.5] > losses[0.0] + 0.5  # the balancing loss is at least 1


def test_a_model_that_is_stored_with_router_logits_can_be_sampled_from(tmp_path):
    config = write_experts(tmp_path / "model", output_router_logits=True)
    tokenizer = tiny_tokenizer()
    require_cache(load_policy(config, tokenizer), tokenizer, "model.path", "fix")
