"""Models that PPO does not train: stored in the type in which autocast reads them, and moved to the
CPU between the phases that read them.

A CPU's autocast rounds weights as a GPU's does. The second device is a record of `.to`: a model is
where it was moved last.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.allocations import Rounded
from helpers.families import TOKENIZER, every_family, exact, padded
from helpers.scorers import write_reward_model
from helpers.tiny import tiny_model
from helpers.tiny_ppo import make_config, make_trainer
from torch import nn
from transformers import AutoModelForSequenceClassification

import rlhf.equivalence as equivalence
import rlhf.ppo.rollout as rollout_module
import rlhf.ppo.scoring as scoring_module
from rlhf import train_ppo
from rlhf.config import InputError, ScorerConfig
from rlhf.equivalence import choose_forward, store_as_read
from rlhf.metrics import read_jsonl
from rlhf.models import ScalarModel, forward_inputs, freeze
from rlhf.ppo.passes import policy_logprobs
from rlhf.ppo.preflight.longest_step import longest_micro_batch
from rlhf.ppo.preflight.memory import estimate_memory

IDS, MASK = padded([[11, 12, 13, 14, 15, 16], [20, 21], [30, 31, 32, 33]], "right")


def frozen_models(family):
    """A reference and a reward model of a family."""
    policy = tiny_model(family, TOKENIZER)
    policy.config.num_labels = 1
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(policy.config).eval()
    return freeze(policy), freeze(ScalarModel(classifier))


def run_in_bfloat16(policy_dir, folder):
    """A run with a reference of its own and two reward models."""
    config = make_config(policy_dir, folder, num_updates=2, missing_eos_penalty=None)
    paths = [write_reward_model(folder / name, TOKENIZER, seed) for seed, name in enumerate("ab")]
    config.scorer = ScorerConfig(paths[0], normalize="none")
    config.evaluation.scorer, config.precision = paths[1], "bfloat16"
    return config


@every_family
@pytest.mark.parametrize("forward", ["padded", "padding_free"])
def test_frozen_weights_are_rounded_without_changing_a_bit(family, forward):
    models = policy, scorer = frozen_models(family)

    def read():
        logits = policy(**forward_inputs(policy, IDS, MASK), use_cache=False).logits
        return logits, scorer(IDS, MASK)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        try:
            [choose_forward(model, TOKENIZER, forward) for model in models]
        except InputError:
            pytest.skip("it cannot be read without padding")
        expected, before = read(), [sum(p.nbytes for p in m.parameters()) for m in models]
        assert [store_as_read(m, TOKENIZER) for m in models] == ["bfloat16", "bfloat16"]
        for actual, wanted in zip(read(), expected, strict=True):
            exact(actual, wanted)
    after = [sum(p.nbytes for p in m.parameters()) for m in models]
    assert all(a < 0.75 * b for a, b in zip(after, before, strict=True))
    assert scorer.model.score.weight.dtype == torch.float32
    assert policy.get_input_embeddings().weight.dtype == torch.float32


def test_without_autocast_the_weights_stay():
    policy, _ = frozen_models("llama")
    assert store_as_read(policy, TOKENIZER) == "float32"
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_a_model_whose_numbers_would_change_keeps_its_weights():
    """A layer that reads its weights in float32 even under autocast, as some routers do."""
    policy, _ = frozen_models("llama")
    layer = policy.model.layers[0].mlp.down_proj

    def in_float32(x):
        with torch.autocast("cpu", enabled=False):
            return nn.functional.linear(x.float(), layer.weight.float())

    layer.forward = in_float32
    before = {name: p.clone() for name, p in policy.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        found = store_as_read(policy, TOKENIZER)
    assert found == "float32, because its numbers change otherwise"
    for name, parameter in policy.named_parameters():
        exact(parameter, before[name])


def test_a_run_in_bfloat16_has_the_metrics_of_float32_weights(
    policy_dir, tmp_path, monkeypatch, capsys
):
    rows = {}
    for rounds in (True, False):
        if not rounds:
            monkeypatch.setattr(equivalence, "round_linear_weights", lambda *_: lambda: None)
        config = run_in_bfloat16(policy_dir, tmp_path)
        config.run_name = f"rounds-{rounds}"
        directory = train_ppo(config).directory
        rows[rounds] = read_jsonl(directory.parent / "metrics.jsonl")
    a, b = config.scorer.path, config.evaluation.scorer
    said = f"reference bfloat16, {a} bfloat16, {b} bfloat16"
    assert f"     frozen models: {said}\n" in capsys.readouterr().out
    assert rows[True] == rows[False] and "eval_independent_score" in rows[True][0]
    assert json.loads((directory / "rlhf.json").read_text())["frozen"] == said


def test_the_preflight_reads_rounded_weights_as_the_run_does(policy_dir, tmp_path, capsys):
    config = run_in_bfloat16(policy_dir, tmp_path)
    config.preflight = "only"
    train_ppo(config)
    printed = capsys.readouterr().out
    assert "\nok    memory " in printed and "\nok    scorer " in printed
    assert re.search(r"\npreflight: (ok|\d+ warnings?) \(", printed), "what it warns of is luck"


def test_a_model_that_has_been_read_leaves_no_rounded_weights(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    policy, rollout, counts = trainer.actors.policy, trainer.collect(), []

    def read(part):
        return policy_logprobs(policy, part, trainer.sampling)[0]

    settings = trainer.config.ppo, trainer.accelerator
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with Rounded() as rounded:
                rollout_module.read_tokens(rollout, [torch.arange(8)], read, *settings)
            counts.append(rounded.count)
    assert counts[0] == counts[1] > 20_000


def test_a_float32_run_says_nothing_about_frozen_models(policy_dir, tmp_path, capsys):
    config = make_config(policy_dir, tmp_path, num_updates=1)
    directory = train_ppo(config).directory
    assert "frozen" not in capsys.readouterr().out
    assert json.loads((directory / "rlhf.json").read_text())["frozen"] is None


# --- Offloading -----------------------------------------------------------------------------------


def test_offloaded_models_are_on_the_gpu_only_while_they_are_read(
    policy_dir, tmp_path, monkeypatch
):
    config = make_config(policy_dir, tmp_path, missing_eos_penalty=None)
    path = write_reward_model(tmp_path / "a", TOKENIZER, 0)
    config.scorer = ScorerConfig(path, normalize="none")
    trainer = make_trainer(config, tmp_path)
    actors, plain = trainer.actors, make_trainer(config, tmp_path)
    frozen = {"reference": actors.reference, "scorer": actors.scorer.model}
    where, seen = dict.fromkeys(frozen, "cpu"), {}
    for name, model in frozen.items():
        monkeypatch.setattr(model, "to", lambda device, name=name: where.update({name: device}))
    actors.reading_device = "gpu"

    def watch(holder, function, phase):
        original = getattr(holder, function)

        def watched(*args, **keywords):
            is_reference = function == "policy_logprobs" and args[0] is actors.reference
            name = "reading the reference" if is_reference else phase
            seen.setdefault(name, set()).add(tuple(where.values()))
            return original(*args, **keywords)

        monkeypatch.setattr(holder, function, watched)

    watch(rollout_module, "generate", "sampling")
    watch(scoring_module, "score_responses", "scoring")
    watch(rollout_module, "policy_logprobs", "reading with another model")
    watch(rollout_module, "read_policy", "reading the policy")
    watch(rollout_module, "critic_values", "reading the critic")
    watch(trainer.updater, "accumulate", "optimising")
    for _ in range(2):
        metrics = trainer.step()
    nowhere = {("cpu", "cpu")}
    assert seen == {
        "sampling": nowhere,
        "scoring": {("cpu", "gpu")},
        "reading the policy": nowhere,
        "reading the reference": {("gpu", "cpu")},
        "reading the critic": nowhere,
        "optimising": nowhere,
    }
    monkeypatch.undo()
    assert metrics == [plain.step() for _ in range(2)][-1]


def test_a_scorer_that_fails_leaves_no_model_on_the_gpu(policy_dir, tmp_path, monkeypatch):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    where = []
    trainer.actors.reading_device = "gpu"
    monkeypatch.setattr(trainer.actors.reference, "to", where.append)
    with pytest.raises(ZeroDivisionError), trainer.actors.in_use(trainer.actors.reference):
        1 / 0  # noqa: B018
    assert where == ["gpu", "cpu"]


def test_the_preflight_counts_one_offloaded_model_at_a_time(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    config.scorer = ScorerConfig(write_reward_model(tmp_path / "a", TOKENIZER, 0), normalize="none")
    trainer = make_trainer(config, tmp_path)
    part = longest_micro_batch(trainer)
    whole = estimate_memory(trainer, part)
    trainer.actors.reading_device = "gpu"
    less = estimate_memory(trainer, part)
    frozen = [whole.models.pop(name).weights for name in ("reference", "reward models")]
    assert less.models == whole.models and less.visiting == max(frozen)
    less.sampling = 0
    for model in less.models.values():
        model.activations = model.gradients = 0
    assert less.total == less.sum("weights", "adam") + max(frozen)


def test_on_a_cpu_offloading_says_that_it_does_nothing(policy_dir, tmp_path, capsys):
    config = make_config(policy_dir, tmp_path, num_updates=1)
    config.offload_frozen = True
    train_ppo(config)
    expected = "     frozen models: not offloaded: all models are on the CPU\n"
    assert expected in capsys.readouterr().out
