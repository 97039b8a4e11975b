"""Forward passes of so many tokens: their rows, the same update, and the preflight's choice.

Run: pytest tests/ppo/test_micro_batch_tokens.py
"""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.preflight import letters, look, scored_by
from helpers.scorers import write_reward_model
from helpers.tiny_ppo import make_config, make_trainer, weights

from rlhf import train_ppo
from rlhf.config import InputError, PPOConfig, PPOStageConfig, ScorerConfig
from rlhf.ppo.preflight import longest_step
from rlhf.ppo.preflight.longest_step import Step, longest_micro_batch, measure_longest_step
from rlhf.ppo.preflight.memory import MemoryEstimate, ModelMemory
from rlhf.ppo.prompts import require_room_for_rows
from rlhf.ppo.rollout import micro_batches, passes
from rlhf.ppo.stage import require_equal_shares
from rlhf.tokenizer import load_tokenizer


def test_rows_that_the_processes_cannot_share_are_refused():
    config = PPOStageConfig(ppo=PPOConfig(batch_size=24, num_mini_batches=4))
    config.ptx.batch_size, config.ptx.coef = 9, 0.0
    for number in (1, 2, 3, 6):
        require_equal_shares(config, number)
    text = (
        "ppo.batch_size / ppo.num_mini_batches = 6 must be divisible by the 4 processes; start a "
    )
    with pytest.raises(InputError, match=f"^{text}number .* new run change ppo.batch_size$"):
        require_equal_shares(config, 4)
    config.ptx.coef = 1.0
    require_equal_shares(config, 3)
    with pytest.raises(InputError, match="^ptx.batch_size=9 must be divisible by the 2 processes"):
        require_equal_shares(config, 2)


def test_a_pass_takes_as_many_rows_as_fit_at_the_length_of_its_longest():
    lengths = [10, 8, 8, 3, 1, 1, 1]
    assert passes(lengths, 10, PPOConfig(micro_batch_tokens=16)) == [1, 2, 4]
    assert passes(lengths, 10, PPOConfig(micro_batch_tokens=10)) == [1, 1, 1, 3, 1]
    limits = PPOConfig(micro_batch_tokens=16, micro_batch_size=2)
    assert passes(lengths, 10, limits) == [1, 2, 2, 2]
    assert passes(lengths, 10, PPOConfig(micro_batch_tokens=1000)) == [7]


def test_by_default_a_pass_takes_the_tokens_of_the_eight_longest_rows():
    assert passes([10] * 14, 10, PPOConfig()) == [8, 6]
    assert passes([5] * 20, 10, PPOConfig()) == [16, 4]  # another minibatch has a row of 10
    assert passes([10] * 4 + [4] * 26, 10, PPOConfig()) == [8, 20, 2]
    assert passes([5] * 20, 10, PPOConfig(micro_batch_size=8)) == [8, 8, 4]


@pytest.mark.parametrize("tokens", [24, 100])  # a prompt has at most 12 tokens, a response 12
def test_an_update_is_the_same_for_any_number_of_tokens(policy_dir, tmp_path, tokens):
    results = []
    for limits in ({"micro_batch_size": 4}, {"micro_batch_size": None}):
        config = make_config(policy_dir, tmp_path, **limits)
        if limits["micro_batch_size"] is None:
            config.ppo.micro_batch_tokens = tokens
        trainer = make_trainer(config, tmp_path)
        start = weights(trainer)
        metrics = [trainer.step() for _ in range(2)]
        assert all(m["first_ratio_deviation"] == 0.0 for m in metrics)
        results.append((weights(trainer) - start, metrics[-1]))
    (expected, plain), (actual, other) = results
    assert (actual - expected).norm() / expected.norm() < 1e-5
    for name in ("policy_loss", "value_loss", "approx_kl", "entropy", "grad_norm"):
        assert math.isclose(plain[name], other[name], rel_tol=1e-5, abs_tol=1e-6), name


def test_processes_make_equally_many_passes_over_shares_of_similar_size(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path, batch_size=16), tmp_path)
    batch, ppo = trainer.collect(), PPOConfig(micro_batch_tokens=40)
    lengths, minibatch = batch.sequence_mask.sum(dim=1), torch.arange(12) + 2
    shares = [
        micro_batches(batch, minibatch, ppo, SimpleNamespace(process_index=i, num_processes=3))
        for i in range(3)
    ]
    assert len({len(share) for share in shares}) == 1
    assert sorted(int(row) for share in shares for rows in share for row in rows) == [*range(2, 14)]
    for share in shares:
        for rows in share:
            assert len(rows) * int(lengths[rows].max()) <= 40
    totals = [int(lengths[torch.cat(share)].sum()) for share in shares]
    assert max(totals) - min(totals) <= int(lengths[minibatch].max() - lengths[minibatch].min())


def test_a_process_splits_passes_until_it_makes_as_many_as_the_others():
    lengths = torch.tensor([20, 1, 20, 1, 20, 1])
    mask = torch.arange(20) < lengths[:, None]
    batch, ppo = SimpleNamespace(sequence_mask=mask), PPOConfig(micro_batch_tokens=20)
    # sorted, the shares have lengths 20 20 1 and 20 1 1
    sizes = [
        [*map(len, micro_batches(batch, torch.arange(6), ppo, of_two(process)))]
        for process in range(2)
    ]
    assert sizes == [[1, 1, 1], [1, 1, 1]]


def of_two(process):
    return SimpleNamespace(process_index=process, num_processes=2)


# --- The preflight's choice -----------------------------------------------------------------------


def estimate_of(activations):
    return MemoryEstimate({"policy": ModelMemory(0, 0, 0, activations)}, 0)


def test_the_preflight_chooses_tokens_for_half_of_the_room_and_fewer_where_a_step_does_not_fit(
    policy_dir, tmp_path, monkeypatch
):
    config = make_config(policy_dir, tmp_path, batch_size=64, micro_batch_size=None)
    config.ppo.micro_batch_tokens = "auto"
    trainer = make_trainer(config, tmp_path)
    part = longest_micro_batch(trainer)
    length = part.sequence_ids.shape[1]
    assert len(part) == 8
    steps = []

    def measure(trainer, part, fits):
        steps.append(len(part))
        return Step(0.1, 5, "" if len(part) <= fits else "out of memory")

    tokens = 8 * length
    for room, fits, most in ((2 * 20 * length, 99, 20), (2 * 20 * length, 3, 20), (1, 0, 1)):
        config.ppo.micro_batch_tokens, steps[:] = "auto", []
        monkeypatch.setattr(longest_step, "measure_step", partial(measure, fits=fits))
        # a byte per token
        step, chosen = measure_longest_step(trainer, estimate_of(tokens), room, part)
        assert steps[0] <= most and len(chosen) == steps[-1] and steps == sorted(steps)[::-1]
        assert (step.problem == "") == (len(chosen) <= fits)
        chosen_tokens = config.ppo.micro_batch_tokens
        assert length <= chosen_tokens <= max(length, 20 * length)
        assert chosen_tokens == length or chosen_tokens & (chosen_tokens - 1) == 0
    assert len(chosen) == 1  # one row is tried in any case


def test_the_choice_is_printed_and_trained_with(policy_dir, tmp_path, capsys):
    trainer = scored_by(policy_dir, tmp_path, letters)
    trainer.config.ppo.micro_batch_size, trainer.config.ppo.micro_batch_tokens = None, "auto"
    found, _, _ = look(trainer, capsys)
    tokens = trainer.config.ppo.micro_batch_tokens
    assert isinstance(tokens, int) and tokens > 100
    assert found["longest step"][1].startswith(f"ppo.micro_batch_tokens={tokens}, 4 x (")
    trainer.step()


def test_a_cpu_reads_eight_rows_unless_it_is_asked(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path, micro_batch_size=None), tmp_path)
    assert not longest_step.chooses_tokens(trainer) and trainer.config.ppo.rows_of(999) == 8


# --- Refusals -------------------------------------------------------------------------------------


def test_a_budget_that_the_longest_row_exceeds_is_refused():
    ppo = PPOConfig(micro_batch_tokens=20, response_length=12)
    with pytest.raises(InputError, match="a prompt of 9 tokens.*set it to 21 or more"):
        require_room_for_rows(ppo, 9)
    require_room_for_rows(ppo, 8)


class Loads(Exception):
    """Models begin to load."""


def begin(config, monkeypatch):
    """Run the stage until models load."""

    def load(*_):
        raise Loads

    monkeypatch.setattr("rlhf.ppo.stage.load_actors", load)
    train_ppo(config)


@pytest.mark.parametrize("reward_model", [False, True])
def test_it_is_refused_before_models_load(policy_dir, tmp_path, monkeypatch, reward_model):
    config = make_config(policy_dir, tmp_path, micro_batch_size=None, missing_eos_penalty=None)
    if reward_model:
        tokenizer = load_tokenizer(config.model)
        config.scorer = ScorerConfig(write_reward_model(tmp_path, tokenizer, 1), "none")
    config.ppo.micro_batch_tokens = 20
    with pytest.raises(InputError, match="^ppo.micro_batch_tokens=20 is less than the longest row"):
        begin(config, monkeypatch)
    config.ppo.micro_batch_tokens = 100
    with pytest.raises(Loads):
        begin(config, monkeypatch)


def test_prompts_that_will_be_dropped_do_not_count(policy_dir, tmp_path, monkeypatch):
    """A limit, the context of the policy, or a reward model that counts other tokens."""
    limited, short, other = (
        make_config(policy_dir, tmp_path, micro_batch_size=None, missing_eos_penalty=None)
        for _ in range(3)
    )
    limited.ppo.max_prompt_length = 8
    short.model.path = str(tmp_path / "short")
    shutil.copytree(policy_dir, short.model.path)
    file = tmp_path / "short/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 20}))
    tokenizer = load_tokenizer(other.model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    other.scorer = ScorerConfig(write_reward_model(tmp_path / "other", tokenizer, 1), "none")
    for config in (limited, short, other):
        config.ppo.micro_batch_tokens = 20
        with pytest.raises(Loads):
            begin(config, monkeypatch)
