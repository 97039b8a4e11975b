"""The preflight: every check fires for its cause, the numbers are right, and a run stays the same.

Run: python -m pytest tests/ppo/test_preflight.py
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import resource
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import CORPUS, tiny_model, tiny_tokenizer
from helpers.tiny_ppo import WORDS, make_config, make_trainer, write_policy, write_prompts
from safetensors.torch import load_file
from torch.multiprocessing import spawn

import rlhf.ppo.preflight.preflight as preflight
from rlhf.config import PeftConfig, ScorerConfig
from rlhf.data import encode_prompts
from rlhf.functional import token_entropy
from rlhf.models import disable_dropout, init_reward_model
from rlhf.ppo import train_ppo
from rlhf.ppo.loop import PPOResult
from rlhf.ppo.preflight.findings import (
    Check,
    check_best_of_n,
    check_memory,
    check_scorer,
    check_step,
    check_stop_token,
    check_tokenizer,
)
from rlhf.ppo.preflight.memory import (
    MemoryEstimate,
    ModelMemory,
    cache_bytes_per_token,
    estimate_memory,
    longest_micro_batch,
    measure_step,
    model_memory,
)
from rlhf.ppo.preflight.preflight import PreflightFailed, bottom_line, report, run_preflight
from rlhf.ppo.rollout import policy_logprobs
from rlhf.sampling import Generation, Sampling
from rlhf.scorers import load_scorer

ROOT = Path(__file__).resolve().parents[2]


def letters(prompts, responses):
    """Score a response by the share of letters in its first ten characters: not by its length."""
    return [sum(map(str.isalpha, r[:10])) / (len(r[:10]) or 1) for r in responses]


def constant(prompts, responses):
    return [0.25] * len(responses)


def some_nan(prompts, responses):
    return [math.nan if len(r) > 5 else 1.0 for r in responses]


def noisy(prompts, responses):
    """Score with noise from every global generator."""
    noise = [random.random() + np.random.rand() + float(torch.rand(())) for _ in responses]
    return [a + b for a, b in zip(letters(prompts, responses), noise, strict=True)]


def leaky(prompts, responses):
    """Average over the padded width: the longest response of a batch changes the others' scores."""
    width = max(map(len, responses))
    return [sum(map(str.isalpha, r)) / width for r in responses]


def slightly_leaky(prompts, responses):
    width = max(map(len, responses))
    return [s + 1e-5 * width for s in letters(prompts, responses)]


def one_at_most(prompts, responses):
    """Break on a single response, as a forgotten `squeeze` does."""
    return torch.tensor(letters(prompts, responses)).squeeze()


def by_length(prompts, responses):
    return [float(len(r)) for r in responses]


def against_length(prompts, responses):
    return [-float(len(r)) for r in responses]


def very_low(prompts, responses):
    return [s - 5.0 for s in letters(prompts, responses)]


def opposite(prompts, responses):
    return [-s for s in letters(prompts, responses)]


def heldout_prompts(trainer, number=4):
    rows = [{"prompt": f"{WORDS[i]} {WORDS[i + 1]}"} for i in range(number)]
    return encode_prompts(rows, trainer.actors.tokenizer, 64)[0]


def look(trainer, capsys, independent=None, heldout=True):
    """{name: (status, text and remedy)} as printed, the bottom line, and the exception's text."""
    message = ""
    capsys.readouterr()
    try:
        run_preflight(trainer, heldout_prompts(trainer) if heldout else [], independent)
    except PreflightFailed as error:
        message = str(error)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110 and len(lines) <= 33
    checks, name = {}, ""
    for line in lines[1:-1]:
        if line[:6].strip():
            name = line[6:20].strip()
            checks[name] = (line[:6].strip(), line[20:])
        else:
            checks[name] = (checks[name][0], f"{checks[name][1]} {line.strip()}")
    return checks, lines[-1], message


def scored_by(policy_dir, folder, scorer, **ppo):
    """A trainer with a scorer of this file, and no penalty for a missing EOS."""
    config = make_config(policy_dir, folder, **({"missing_eos_penalty": None} | ppo))
    trainer = make_trainer(config, folder)
    trainer.actors.scorer = scorer
    return trainer


# --- The run itself stays as it is ----------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "rloo": {"advantage": "rloo", "samples_per_prompt": 4},
    "averages": {"ema_decay": 0.9, "kl_in": "loss", "kl_estimator": "k3"},
}


@pytest.mark.parametrize("name", [*OPTIONS, "lora", "ptx"])
def test_preflight_passes_and_leaves_weights_gradients_and_random_numbers_alone(
    policy_dir, tmp_path, capsys, name
):
    config = make_config(policy_dir, tmp_path, **OPTIONS.get(name, {}))
    config.ppo.missing_eos_penalty, config.watchdog.eos_rate = None, None
    config.peft = PeftConfig(enabled=name == "lora", r=4, dropout=0.5)
    config.critic.warmup_updates = 1 if name == "plain" else 0
    trainer = make_trainer(config, tmp_path)
    if name == "ptx":
        trainer.optimization.texts = [list(range(5, 30)), list(range(40, 44))] * 2
        config.ptx.coef = 1.0
    trainer.actors.scorer = letters
    models = [m for m in (trainer.actors.policy, trainer.actors.critic) if m is not None]
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    checks, bottom, _ = look(trainer, capsys, heldout=name != "rloo")
    statuses = {check: status for check, (status, _) in checks.items()}
    assert set(statuses.values()) == {"ok"} and bottom.startswith("preflight: ok (")
    assert len(statuses) == 8
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(old[key], value) for key, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    assert all(not optimizer.state for optimizer in trainer.optimization.optimizers.values())
    now = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(states[0], now[0]) and states[1:] == now[1:]


def test_a_run_with_preflight_equals_one_without_bit_for_bit(policy_dir, tmp_path, capsys):
    results = []
    for preflight_knob in (False, True):
        config = make_config(policy_dir, tmp_path, num_updates=2)
        config.preflight, config.run_name = preflight_knob, f"run-{preflight_knob}"
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        results.append(train_ppo(config, scorer=noisy).directory)
    assert capsys.readouterr().out.count("preflight: 16 responses") == 1
    one, two = (load_file(result / "model.safetensors") for result in results)
    assert all(torch.equal(one[name], two[name]) for name in one)
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert (results[0].parent / file).read_bytes() == (results[1].parent / file).read_bytes()


def test_preflight_only_writes_nothing_and_minds_no_finished_run(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    finished = tmp_path / "runs/run/ppo/final"
    finished.mkdir(parents=True)
    (finished / "model.safetensors").write_text("precious")
    paths = sorted(tmp_path.rglob("*"))
    config.preflight = "only"
    assert train_ppo(config, scorer=letters) == PPOResult(None, {}, {})
    with pytest.raises(PreflightFailed, match="scorer: mean score 0.25, .* a constant"):
        train_ppo(config, scorer=constant)
    assert sorted(tmp_path.rglob("*")) == paths


def test_a_failed_check_stops_the_run_before_anything_is_written(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    config.preflight = True
    with pytest.raises(PreflightFailed, match="nothing was trained:\n  scorer: .* a constant"):
        train_ppo(config, scorer=constant)
    assert not (tmp_path / "runs").exists()
    config.preflight = False
    assert train_ppo(config, scorer=constant).directory is not None


def test_exit_status_says_whether_a_check_failed(policy_dir, tmp_path):
    for scorer, status in (("letters", 0), ("constant", 1)):
        command = [sys.executable, "-m", "rlhf.ppo", "run_name=x", "preflight=only"]
        command += [f"model.path={policy_dir}", "dataset=prompt_completion", "critic.init=policy"]
        command += [f"dataset.path={write_prompts(tmp_path / 'prompts.jsonl')}"]
        command += [f"scorer.path=python:test_preflight.{scorer}", "scorer.normalize=none"]
        command += ["ppo.batch_size=8", "ppo.response_length=12", "dataset.eval_fraction=0.3"]
        command += ["ppo.missing_eos_penalty=-2"]
        paths = f"{ROOT}{os.pathsep}{Path(__file__).parent}{os.pathsep}{ROOT / 'tests'}"
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr and "error:" not in done.stderr
        expected = "preflight: failed: scorer" if status else "preflight: "
        assert done.stdout.splitlines()[-1].startswith(expected)
        assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


# --- Memory ---------------------------------------------------------------------------------------


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("lora", [False, True])
def test_weights_gradients_and_adam_states_are_counted_exactly(policy_dir, tmp_path, lora):
    config = make_config(policy_dir, tmp_path, ema_decay=None if lora else 0.9)
    config.peft = PeftConfig(enabled=lora, r=4)
    trainer = make_trainer(config, tmp_path)
    estimate = estimate_memory(trainer, longest_micro_batch(trainer))
    rollout = trainer.collect()
    trainer.estimate_advantages(rollout, trainer.shape_rewards(rollout)[1])
    optimization = trainer.optimization
    optimization.accumulate(rollout, torch.arange(8))
    assert set(estimate.models) == {"policy", "critic"} | (set() if lora else {"reference"})
    for name in ("policy", "critic"):
        model, memory = getattr(trainer.actors, name), estimate.models[name]
        storages = {p.untyped_storage().data_ptr(): p for p in model.parameters()}.values()
        averages = (optimization.averages or {}).values() if name == "policy" else ()
        assert memory.weights == nbytes(storages) + nbytes(averages)
        assert memory.gradients == nbytes(p.grad for p in model.parameters() if p.grad is not None)
        optimization.optimizers[name].step()
        states = optimization.optimizers[name].state.values()
        moments = (t for state in states for key, t in state.items() if key != "step")
        assert memory.adam == nbytes(moments) > 0
    if not lora:
        reference = estimate.models["reference"]
        assert reference == ModelMemory(weights=nbytes(trainer.actors.reference.parameters()))


def test_reward_models_that_score_and_judge_are_counted(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    model = init_reward_model(trainer.config.model, trainer.actors.tokenizer, seed=0)
    model.save_pretrained(tmp_path / "reward")
    trainer.actors.tokenizer.save_pretrained(tmp_path / "reward")
    trainer.actors.scorer = load_scorer(ScorerConfig(str(tmp_path / "reward"), normalize="none"))
    part, weights = longest_micro_batch(trainer), nbytes(trainer.actors.scorer.model.parameters())
    for independent, number in ((None, 1), (letters, 1), (trainer.actors.scorer, 2)):
        estimate = estimate_memory(trainer, part, independent)
        assert estimate.models["reward models"] == ModelMemory(number * weights)


def test_gradients_stand_twice_where_processes_exchange_them(policy_dir, tmp_path):
    model = tiny_model("llama", tiny_tokenizer())
    alone, together = model_memory(model), model_memory(model, distributed=True)
    assert together.gradients == 2 * alone.gradients == 2 * nbytes(model.parameters())
    assert (together.weights, together.adam) == (alone.weights, alone.adam)


@pytest.mark.parametrize(
    ("knobs", "per_number"),
    [
        ({"load_in_8bit": True}, 1.0),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 0.5 + 4 / 64),
    ],
    ids=["8bit", "4bit"],
)
def test_quantised_layers_count_as_they_are_packed_by_hand(tmp_path, knobs, per_number):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model("llama", tiny_tokenizer()).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(**knobs)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantised, dtype=torch.float32
    )
    blocks = 2 * (4 * 32 * 32 + 3 * 32 * 64)  # attention and MLP of two layers
    others = 2 * 320 * 32 + 5 * 32  # embeddings and head; norms: in float32
    assert model_memory(model).weights == blocks * per_number + others * 4


def most_allocated(function):
    """Bytes that a function holds at most at once, by torch's own record of its allocations."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=kinds) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_activations_are_estimated_within_a_tenth(policy_dir, tmp_path, family, attention):
    trainer = make_trainer(make_config(policy_dir, tmp_path, micro_batch_size=4), tmp_path)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 256}
    model = tiny_model(family, trainer.actors.tokenizer, vocab_size=2000, **sizes)
    model.set_attn_implementation(attention)
    disable_dropout(model)
    trainer.actors.policy = model
    trainer.settings = dataclasses.replace(
        trainer.settings, sampling=dataclasses.replace(trainer.settings.sampling, max_new_tokens=96)
    )
    part = longest_micro_batch(trainer)

    def step():
        logprobs, logits = policy_logprobs(model, part, trainer.settings.sampling)
        with torch.no_grad():
            token_entropy(logits)
        logprobs.sum().backward()

    step()  # gradients stand from here on
    assert len(part) == 4
    estimate = estimate_memory(trainer, part).models["policy"].activations
    actual = most_allocated(step)
    assert 0.9 < estimate / actual <= 1.02, (estimate, actual)


def test_cache_is_two_tensors_a_layer(policy_dir, tmp_path):
    part = longest_micro_batch(make_trainer(make_config(policy_dir, tmp_path), tmp_path))
    layers, heads, head_size = 2, 2, 8
    model = tiny_model("llama", tiny_tokenizer(), num_key_value_heads=heads)
    assert cache_bytes_per_token(model, part) == 2 * layers * heads * head_size * 4
    model.gradient_checkpointing_enable()
    disable_dropout(model)  # its layers train from here on, and training layers keep no cache
    assert cache_bytes_per_token(model, part) == 2 * layers * heads * head_size * 4


def test_the_step_uses_the_longest_prompt_and_the_whole_budget(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    part = longest_micro_batch(trainer)
    longest = max(len(p["input_ids"]) for p in trainer.prompts)
    assert part.sequence_ids.shape == (3, longest + 12) and part.sequence_mask.all()
    trainer.config.ppo.micro_batch_size = 64  # of 8 / 2 sequences in a minibatch
    assert len(longest_micro_batch(trainer)) == 4
    step = measure_step(trainer, part)
    assert step.problem == "" and step.seconds > 0 and step.rise is not None


def estimate_of(weights=0, adam=0, activations=0, sampling=0):
    """One model of that many bytes, without gradients."""
    return MemoryEstimate({"policy": ModelMemory(weights, 0, adam, activations)}, sampling)


REMEDIES = [
    ({"weights": 100, "adam": 300}, {}, "gradients and Adam states: set peft=lora"),
    (
        {"weights": 300, "adam": 10},
        {"lora": True},
        "weights: set model.dtype=bfloat16 or model.quantization=4bit",
    ),
    (
        {"weights": 300, "adam": 10},
        {"lora": True, "dtype": "bfloat16"},
        "weights: set model.quantization=4bit",
    ),
    ({"activations": 300, "adam": 10}, {}, "set ppo.micro_batch_size=1 or model.gradient_check"),
    (
        {"activations": 300, "adam": 10},
        {"micro_batch_size": 1},
        "activations: set model.gradient_checkpointing=true",
    ),
    ({"sampling": 300, "adam": 10}, {}, "the rollout's cache: set ppo.rollout_batch_size=32"),
    (
        {"activations": 300, "weights": 20},
        {"micro_batch_size": 1, "checkpointing": True},
        "weights: set peft=lora",
    ),
    (
        {"activations": 300, "weights": 20},
        {
            "micro_batch_size": 1,
            "checkpointing": True,
            "lora": True,
            "dtype": "bfloat16",
            "quantization": "4bit",
        },
        "take a smaller model",
    ),
]


@pytest.mark.parametrize(("sizes", "knobs", "remedy"), REMEDIES)
def test_too_little_memory_names_the_knob_of_the_largest_part(
    policy_dir, tmp_path, sizes, knobs, remedy
):
    config = make_config(policy_dir, tmp_path, micro_batch_size=knobs.get("micro_batch_size", 3))
    config.peft = PeftConfig(enabled=knobs.get("lora", False))
    config.model.gradient_checkpointing = knobs.get("checkpointing", False)
    config.model.dtype = knobs.get("dtype", "float32")
    config.model.quantization = knobs.get("quantization")
    estimate = estimate_of(**sizes)
    assert estimate.total == sum(sizes.values())
    for room, status in ((1.01, "WARN"), (0.99, "FAIL"), (1.2, "ok")):
        check = check_memory(estimate, int(room * estimate.total), config)
        assert check.status == status
        assert (remedy in check.remedy) == (status != "ok")


def test_policy_and_critic_step_one_after_the_other_and_sampling_has_no_gradients():
    policy, critic = ModelMemory(10, 20, 40, 500), ModelMemory(1, 2, 4, 300)
    assert MemoryEstimate({"policy": policy, "critic": critic}, 400).total == 77 + 500
    assert MemoryEstimate({"policy": policy, "critic": critic}, 600).total == 55 + 600


def test_a_run_that_cannot_fit_fails_without_trying_the_step(
    policy_dir, tmp_path, capsys, monkeypatch
):
    trainer = scored_by(policy_dir, tmp_path, letters)
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 1000)
    checks, bottom, message = look(trainer, capsys)
    assert checks["memory"][0] == "FAIL" and "longest step" not in checks
    assert bottom.startswith("preflight: failed: memory (")
    assert "memory: about" in message and "peft=lora" in message


def test_adam_states_count_on_top_of_the_measured_step(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    part, estimate = longest_micro_batch(trainer), estimate_of(adam=300)
    step = dataclasses.replace(measure_step(trainer, part), rise=500)
    for free, status in ((1000, "ok"), (900, "WARN"), (700, "FAIL")):
        assert check_step(step, estimate, free, part, trainer.config).status == status


def test_running_out_of_memory_is_a_failed_check_with_the_remedy(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, batch_size=1024, micro_batch_size=1024)
    config.ppo.num_mini_batches = 1
    trainer = make_trainer(config, tmp_path)
    part = longest_micro_batch(trainer)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 40 * 2**20, limits[1]))
    try:
        step = measure_step(trainer, part)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert step.problem == "out of memory"
    assert all(p.grad is None for p in trainer.actors.policy.parameters())
    check = check_step(step, estimate_of(activations=9), 10**9, part, config)
    assert check.status == "FAIL" and "ppo.micro_batch_size=512" in check.remedy
    assert measure_step(trainer, part).problem == ""


# --- The policy -----------------------------------------------------------------------------------


def test_dropout_that_is_switched_on_after_loading_fails(policy_dir, tmp_path, capsys):
    trainer = scored_by(policy_dir, tmp_path, letters)
    assert look(trainer, capsys)[0]["first ratio"][1].startswith("largest |ratio - 1| 0; KL to")
    for layer in trainer.actors.policy.model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.self_attn.train()
    checks, bottom, message = look(trainer, capsys)
    assert checks["first ratio"][0] == "FAIL" and "switch dropout off" in checks["first ratio"][1]
    assert "failed: first ratio" in bottom and "first ratio: largest |ratio - 1|" in message


def test_a_reference_that_is_another_model_fails(policy_dir, tmp_path, capsys):
    trainer = scored_by(policy_dir, tmp_path, letters)
    trainer.actors.reference = tiny_model("llama", trainer.actors.tokenizer, seed=1)
    assert look(trainer, capsys)[0]["first ratio"][0] == "FAIL"


def test_numbers_that_are_not_finite_fail(policy_dir, tmp_path, capsys):
    trainer = scored_by(policy_dir, tmp_path, letters)
    with torch.no_grad():
        trainer.actors.policy.model.norm.weight.fill_(math.inf)
    checks, _, _ = look(trainer, capsys)
    assert checks["longest step"][0] == "FAIL" and "not finite" in checks["longest step"][1]
    assert checks["first ratio"][0] == "FAIL"


def ending_in(folder, stop_ids):
    """The tiny policy with these stop tokens."""
    directory = write_policy(folder / "policy")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids}))
    return directory


def test_a_policy_that_never_ends_is_the_sft_stages_fault(tmp_path, capsys):
    trainer = scored_by(ending_in(tmp_path, [2]), tmp_path, letters, missing_eos_penalty=-1.0)
    checks, bottom, _ = look(trainer, capsys)
    status, text = checks["stop token"]
    assert status == "WARN" and "given 48 tokens, " in text and "SFT stage is at fault" in text
    assert "warning" in bottom and "failed" not in bottom


def test_a_budget_that_is_too_short_is_told_from_an_sft_stage_at_fault(tmp_path, capsys):
    directory = ending_in(tmp_path, [2, *range(10, 320, 10)])
    trainer = scored_by(directory, tmp_path, letters, response_length=3)
    trainer.config.watchdog.eos_rate = 0.7
    status, text = look(trainer, capsys)[0]["stop token"]
    assert status == "WARN" and "of at most 3 tokens; given 12 tokens, " in text
    assert "raise ppo.response_length to about " in text
    trainer.config.watchdog.eos_rate = None
    assert look(trainer, capsys)[0]["stop token"][0] == "ok"


def longest_rollout(trainer, finished):
    """A rollout with the whole budget used, and these flags."""
    part = longest_micro_batch(trainer).select(torch.zeros(len(finished), dtype=torch.long))
    part.finished = torch.tensor(finished)
    return part


def test_the_budget_that_is_advised_lets_95_percent_of_those_that_end_end(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    rollout = longest_rollout(trainer, [False] * 9 + [True])
    lengths = [*range(1, 21), 30, 30]
    longer = Generation([[5] * n for n in lengths], [[0.0] * n for n in lengths], [True] * 22)
    longer.finished[-2:] = [False, False]  # 20 of 22 end, 19 of them within 19 tokens
    sampling = trainer.settings.sampling
    check = check_stop_token(2, sampling, rollout, 0.5, lambda: (30, longer))
    assert "response_length to about 19, " in check.remedy and "30 tokens, 91% do" in check.text
    check = check_stop_token(2, sampling, rollout, 0.95, lambda: (30, longer))
    assert "SFT stage is at fault" in check.remedy


def test_an_eos_that_can_never_be_sampled_fails(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    rollout = longest_rollout(trainer, [True] * 4)
    sampling = Sampling(10, (7,), torch.tensor([0, 7]))  # as a caller of the library may build it
    check = check_stop_token(7, sampling, rollout, 0.5, None)
    assert check.status == "FAIL" and "EOS (id 7)" in check.text and "eos_token" in check.remedy


def test_text_that_does_not_survive_the_tokenizer_is_shown():
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer()
    assert check_tokenizer(tokenizer, ["Name a\nfruit ."], ["An Apple"]).status == "ok"
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    check = check_tokenizer(tokenizer, ["name a fruit", "The river Seine"], ["an apple"])
    assert check.status == "WARN" and "1 of 3 texts" in check.text
    assert "'TheriverSeine' -> 'theriverseine'" in check.text and "model.tokenizer" in check.remedy


def test_special_tokens_and_the_chat_template_are_checked():
    tokenizer = tiny_tokenizer()
    talk = [{"role": "user", "content": CORPUS[1]}]
    assert check_tokenizer(tokenizer, [talk], []).status == "FAIL"
    tokenizer.chat_template = "{% for m in messages %}<bos>{{ m.content }}{% endfor %}"
    assert check_tokenizer(tokenizer, [talk], []).status == "ok"
    tokenizer.pad_token = tokenizer.eos_token
    check = check_tokenizer(tokenizer, [talk], [])
    assert check.status == "WARN" and "pad and EOS are the same token (2)" in check.text


# --- The scorer -----------------------------------------------------------------------------------

SCORERS = [
    (constant, "scorer", "FAIL", "a constant, there is nothing to learn"),
    (some_nan, "scorer", "FAIL", "returned nan for"),
    (one_at_most, "scorer", "FAIL", "correct the scorer, or its input"),
    (noisy, "scorer", "WARN", "make the scorer deterministic"),
    (leaky, "scorer", "FAIL", "check the padding and attention mask"),
    (slightly_leaky, "scorer", "WARN", "check the padding and attention mask"),
    (by_length, "length", "WARN", "PPO would learn to write more"),
    (against_length, "length", "WARN", "PPO would learn to write less"),
    (letters, "scorer", "ok", "alone or in a batch it differs by 0"),
    (letters, "length", "ok", "correlation"),
]


@pytest.mark.parametrize(("scorer", "name", "status", "text"), SCORERS)
def test_a_scorer_is_judged(policy_dir, tmp_path, capsys, scorer, name, status, text):
    checks, bottom, message = look(scored_by(policy_dir, tmp_path, scorer), capsys)
    assert checks[name][0] == status and text in checks[name][1], checks[name]
    assert ("failed: scorer" in bottom) == (status == "FAIL") == bool(message)
    assert ("best of n" in checks) == (status != "FAIL")


def test_padding_is_tried_with_the_longest_response():
    lengths = torch.arange(1, 13)

    def score(rows):
        """Three of twelve tokens of padding leak."""
        width = max(rows) + 1
        return torch.tensor([(row % 3) + 0.5 * (width - row > 8) for row in rows])

    scores = torch.tensor([row % 3.0 for row in range(12)])
    assert check_scorer(score, scores, lengths, 0.0, 1e-4).status == "FAIL"
    assert check_scorer(lambda rows: scores[rows], scores, lengths, 0.0, 1e-4).status == "ok"


def test_a_penalty_above_the_scores_is_warned_about(policy_dir, tmp_path, capsys):
    for scorer, whiten, status in (
        (letters, False, "ok"),
        (very_low, True, "ok"),  # about 0 on the scale of whitened scores
        (very_low, False, "WARN"),
    ):
        knobs = {"missing_eos_penalty": -1.0, "whiten_scores": whiten}
        trainer = scored_by(policy_dir, tmp_path, scorer, **knobs)
        checks, _, _ = look(trainer, capsys)
        assert checks["missing EOS"][0] == status
    assert "not ending pays" in checks["missing EOS"][1]


def test_best_of_n_counts_the_penalty_as_ppo_does(policy_dir, tmp_path, capsys):
    trainer = scored_by(policy_dir, tmp_path, letters, missing_eos_penalty=-100.0)
    words = look(trainer, capsys)[0]["best of n"][1].split()
    mean = float(words[words.index("scorer", words.index("of", 20)) + 1])
    assert -90 < mean < -10  # about half of the responses end


def test_best_of_n_shows_expected_maxima_and_what_they_are_worth():
    scores = torch.arange(16.0).repeat(3, 1)[:, torch.randperm(16)]
    check = check_best_of_n(scores, None, 0.0)
    # of 16 numbers, 0 to 15: the mean, the expected largest of 4 (4 * 17 / 5 - 1), the largest
    row = check.details.splitlines()[-1]
    assert row.split() == ["scorer", *"7.5 [7.5, 7.5] 12.6 [12.6, 12.6] 15 [15, 15]".split()]
    assert check.status == "ok" and "best of 16 (1.8 nats of KL)" in check.text
    check = check_best_of_n(scores, 2 * scores, 0.0)
    assert check.status == "ok" and "+15 [15, 15] by evaluation.scorer" in check.text
    assert check.details.splitlines()[-1].split()[-3:] == ["30", "[30,", "30]"]
    check = check_best_of_n(scores, -scores, 0.0)
    assert check.status == "WARN" and "the reward model is at fault" in check.remedy
    mixed = scores * torch.tensor([[1.0], [1.0], [-1.0]])
    check = check_best_of_n(scores, mixed, 0.0)
    assert check.status == "WARN" and "not clearly better" in check.text
    check = check_best_of_n(torch.tensor([[1.0], [5.0]]).expand(2, 16), None, 0.0)
    assert check.status == "WARN" and "raise ppo.temperature" in check.remedy


@pytest.mark.parametrize(("independent", "status"), [(letters, "ok"), (opposite, "WARN")])
def test_the_scorers_choice_is_judged_by_the_independent_scorer(
    policy_dir, tmp_path, capsys, independent, status
):
    checks, _, _ = look(scored_by(policy_dir, tmp_path, letters), capsys, independent)
    assert checks["best of n"][0] == status and "evaluation.scorer" in checks["best of n"][1]
    checks, _, message = look(scored_by(policy_dir, tmp_path, letters), capsys, some_nan)
    assert checks["best of n"][0] == "FAIL" and "evaluation.scorer returned nan" in message


# --- The report -----------------------------------------------------------------------------------


def test_report_wraps_long_texts_and_sums_up():
    checks = [Check("memory", "ok", "fits"), Check("scorer", "WARN", "word " * 60, "do " * 60)]
    lines = report(checks).splitlines()
    assert max(map(len, lines)) <= 110 and lines[0] == "ok    memory        fits"
    assert lines[1].startswith("WARN  scorer        word") and lines[2].startswith(" " * 20 + "w")
    assert sum("-> do" in line for line in lines) == 1
    assert bottom_line(checks[:1]) == "ok" and bottom_line(checks) == "1 warning"
    assert bottom_line(checks * 2) == "2 warnings"
    assert bottom_line([*checks, Check("length", "FAIL", "")]) == "failed: length"


# --- Several processes ----------------------------------------------------------------------------


def run_rank(rank, port, config, folder):
    """One process of two: look twice, and write down what came of it."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in values.items()}
    trainer = make_trainer(config, folder)
    heldout = heldout_prompts(trainer, 3)
    assert len({len(p["input_ids"]) for p in heldout}) > 1
    before = torch.cat([p.detach().flatten() for p in trainer.actors.policy.parameters()])
    trainer.actors.scorer = letters
    outcomes = [[check.status for check in run_preflight(trainer, heldout)]]
    trainer.actors.scorer = constant
    with pytest.raises(PreflightFailed) as raised:
        run_preflight(trainer, heldout)
    after = torch.cat([p.detach().flatten() for p in trainer.actors.policy.parameters()])
    assert torch.equal(before, after)
    trainer.actors.scorer = letters
    ratio_off = trainer.step()["first_ratio_deviation"]  # the processes are still in step
    (folder / f"{rank}.json").write_text(json.dumps([*outcomes, str(raised.value), ratio_off]))


def test_all_processes_come_to_the_same_end(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, missing_eos_penalty=None)
    config.watchdog.eos_rate = None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(run_rank, (port, config, tmp_path), nprocs=2)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == two
    assert one[0] == ["ok"] * 8 and "scorer: mean score 0.25" in one[1] and one[2] == 0.0
