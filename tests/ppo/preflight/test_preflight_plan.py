"""The preflight and `rlhf.plan` count the same run: one on its models, one from a configuration.

Run: python -m pytest tests/ppo/preflight/test_preflight_plan.py
"""

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import tiny_ppo
from helpers.tiny import tiny_model, tiny_tokenizer

from rlhf.config import PeftConfig
from rlhf.models import unwrap_peft
from rlhf.plan.counting import measure
from rlhf.plan.launches import Setting, estimate
from rlhf.ppo.preflight.longest_step import longest_micro_batch
from rlhf.ppo.preflight.memory import estimate_memory
from rlhf.sampling import use_engine


@pytest.mark.parametrize("lora", [False, True])
def test_the_preflight_and_the_plan_count_the_same(lora, tmp_path, monkeypatch):
    """A float32 policy, passes in bfloat16, a copy that samples: as on a GPU."""
    monkeypatch.setattr(tiny_ppo, "Accelerator", partial(Accelerator, mixed_precision="bf16"))
    AcceleratorState._reset_state()
    tokenizer = tiny_tokenizer()
    sizes = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=6)
    for part in (tiny_model("llama", tokenizer, **sizes), tokenizer):
        part.save_pretrained(tmp_path / "policy")
    config = tiny_ppo.make_config(tmp_path / "policy", tmp_path)
    config.peft, config.ppo.response_length = PeftConfig(enabled=lora), 32
    config.checkpoint.background = False
    trainer = tiny_ppo.make_trainer(config, tmp_path)
    part, policy = longest_micro_batch(trainer), trainer.actors.policy
    use_engine(policy, "graph", dtype=torch.bfloat16)
    counted = estimate_memory(trainer, part)
    AcceleratorState._reset_state()

    prompt, length = part.prompt_ids.shape[1], part.sequence_ids.shape[1]
    setting = Setting("ppo", 1, prompt, length - prompt, lora=lora, sampled_rows=8)
    model = measure(unwrap_peft(policy).config, length, lora, "float32")
    planned = estimate(model, setting, "ddp", len(part))
    names = ("policy", "critic", "sampler")
    for name in names:
        ours, theirs = planned.models[name], counted.models[name]
        for kind in ("weights", "gradients", "adam", "activations"):
            # a critic has no table of logits
            assert getattr(ours, kind) == pytest.approx(getattr(theirs, kind), rel=0.03), kind
    assert planned.models["sampler"] == counted.models["sampler"]
    assert planned.sampling == pytest.approx(counted.sampling, rel=0.15)
    del planned.models["reward model"]  # this run scores with a function
    if not lora:  # on a CPU, the reference is in float32
        planned.models["reference"].weights *= 2
    assert planned.total == pytest.approx(counted.total, rel=0.02)
