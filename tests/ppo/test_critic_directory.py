"""The critic of a PPO run as a directory, and a run that starts from one.

Run: python -m pytest tests/ppo/test_critic_directory.py
"""

import shutil
from contextlib import contextmanager

import pytest
import torch
from helpers.tiny_ppo import make_config, make_trainer
from transformers import AutoModelForSequenceClassification

from rlhf import train_ppo
from rlhf.checkpoint import read_record, stage_directory
from rlhf.config import InputError, PeftConfig


@pytest.fixture(scope="module")
def written():
    """Names of the directories that the run of this file has written, in order."""
    return []


@pytest.fixture(scope="module")
def run(policy_dir, tmp_path_factory, written):
    config = make_config(policy_dir, tmp_path_factory.mktemp("critic"))
    config.evaluation.select = "last"
    write = stage_directory.complete_or_nothing

    @contextmanager
    def noted(directory):
        with write(directory) as temporary:
            yield temporary
        written.append(directory.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_directory, "complete_or_nothing", noted)
        train_ppo(config)
    return config


def values_of(trainer):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        return trainer.actors.critic(ids, torch.ones_like(ids, dtype=torch.bool))


def test_a_run_starts_from_the_critic_of_another_one(run, policy_dir, tmp_path):
    saved = run.stage_dir("ppo") / "critic"
    config = make_config(policy_dir, tmp_path)
    fresh = values_of(make_trainer(config, tmp_path))
    config.critic.init = str(saved)
    started = values_of(make_trainer(config, tmp_path))
    plain = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    with torch.no_grad():
        expected = [plain(torch.tensor([[5, 6, 7, 8][: i + 1]])).logits[0, 0] for i in range(4)]
    torch.testing.assert_close(started[0], torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert (started - fresh).abs().max() > 1e-3  # it has been trained


def test_the_directory_holds_the_scale_of_the_values(run, policy_dir, tmp_path):
    saved = tmp_path / "critic"
    shutil.copytree(run.stage_dir("ppo") / "critic", saved)
    record = read_record(saved)
    assert (record.stage, record.score_mean, record.score_std) == ("critic", 0.0, 1.0)
    config = make_config(policy_dir, tmp_path)
    config.critic.init = str(saved)
    before = values_of(make_trainer(config, tmp_path))
    text = (saved / "rlhf.json").read_text().replace('"score_mean": 0.0', '"score_mean": 2.0')
    (saved / "rlhf.json").write_text(text.replace('"score_std": 1.0', '"score_std": 4.0'))
    after = values_of(make_trainer(config, tmp_path))
    torch.testing.assert_close(after, (before - 2.0) / 4.0, rtol=1e-5, atol=1e-5)


def test_adapters_of_a_critic_are_merged(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, num_updates=1)
    config.peft = PeftConfig(enabled=True)
    train_ppo(config)
    saved = config.stage_dir("ppo") / "critic"
    assert not (saved / "adapter_config.json").exists()
    config.critic.init = str(saved)
    config.peft = PeftConfig()
    make_trainer(config, tmp_path)


def test_anything_else_is_refused(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    config.critic.init = str(policy_dir)
    with pytest.raises(InputError, match="is no critic of a PPO run; give runs/<run_name>/ppo"):
        make_trainer(config, tmp_path)


def test_the_critic_is_there_before_the_run_counts_as_finished(run, written):
    assert written == ["critic", "final"]


def test_the_manifest_names_dtype_and_attention(run):
    record = read_record(run.stage_dir("ppo") / "final")
    assert (record.dtype, record.attn_implementation) == ("float32", "sdpa")
