"""`ppo.reference`: the KL reference is another model than the policy that training starts from.

Run: python -m pytest tests/ppo/test_reference.py
"""

import dataclasses
import json
import shutil

import pytest
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tiny_ppo import make_config

from rlhf import train_ppo
from rlhf.checkpoint import hash_weights, read_record
from rlhf.config import InputError, PeftConfig
from rlhf.metrics import read_jsonl


def rows_of(config):
    return read_jsonl(config.stage_dir("ppo") / "metrics.jsonl")


def run(config, name, reference, peft=None):
    ppo = dataclasses.replace(config.ppo, reference=reference, num_updates=1)
    config = dataclasses.replace(config, run_name=name, ppo=ppo, preflight=True)
    config.peft = peft or config.peft
    train_ppo(config)
    return config


@pytest.mark.parametrize("peft", [PeftConfig(), PeftConfig(enabled=True, r=4)])
def test_policy_is_held_near_its_reference_and_not_near_its_start(peft, policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, num_updates=1, response_length=24)
    config.ppo.missing_eos_penalty = None
    config.watchdog.eos_rate = None
    copy = shutil.copytree(policy_dir, tmp_path / "copy")
    other = shutil.copytree(policy_dir, tmp_path / "other")
    tiny_model("llama", tiny_tokenizer(), seed=1).save_pretrained(other)
    start = run(config, "start", None, peft)
    same = run(config, "same", str(copy), peft)
    assert rows_of(start) == rows_of(same) and rows_of(start)[0]["eval_kl"] == 0
    away = run(config, "away", str(other), peft)
    assert rows_of(away)[0]["eval_kl"] > 1
    record = read_record(away.stage_dir("ppo") / "final")
    assert (record.reference, record.reference_weights) == (str(other), hash_weights(other))
    assert record.parent == str(policy_dir)
    assert read_record(start.stage_dir("ppo") / "final").reference is None


def test_reference_with_another_tokenizer_is_refused_before_models_load(
    policy_dir, tmp_path, monkeypatch
):
    other = shutil.copytree(policy_dir, tmp_path / "other")
    file = other / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<bos>"}))
    config = make_config(policy_dir, tmp_path)
    config.ppo.reference = str(other)
    monkeypatch.delattr("rlhf.ppo.actors.load_base")
    with pytest.raises(InputError, match="ppo.reference=.*has another tokenizer.*ppo.reference=nu"):
        train_ppo(config)
