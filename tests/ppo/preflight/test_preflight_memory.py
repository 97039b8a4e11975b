"""The preflight of memory: the estimate, its remedies, and the longest step.

Run: python -m pytest tests/ppo/preflight/test_preflight_memory.py
"""

from __future__ import annotations

import dataclasses
import gc
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import tiny_ppo
from helpers.allocations import most_allocated
from helpers.preflight import letters, look, scored_by
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tiny_ppo import make_config, make_trainer

from rlhf.config import PeftConfig, ScorerConfig
from rlhf.models import (
    add_lora,
    choose_chunk_tokens,
    copy_bytes,
    disable_dropout,
    init_reward_model,
)
from rlhf.ppo.preflight import examine, memory
from rlhf.ppo.preflight.longest_step import examine_longest_step, longest_micro_batch, measure_step
from rlhf.ppo.preflight.memory import (
    MemoryEstimate,
    ModelMemory,
    cache_bytes_per_token,
    checkpoint_bytes,
    estimate_memory,
    examine_main_memory,
    examine_memory,
    model_memory,
)
from rlhf.ppo.rollout import policy_logprobs
from rlhf.sampling import generate, token_loop, use_engine
from rlhf.scorers import load_scorer, score_sequences


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("lora", [False, True])
def test_weights_gradients_and_adam_states_are_counted_exactly(policy_dir, tmp_path, lora):
    config = make_config(policy_dir, tmp_path, ema_decay=None if lora else 0.9)
    config.peft = PeftConfig(enabled=lora, r=4)
    trainer = make_trainer(config, tmp_path)
    estimate = estimate_memory(trainer, longest_micro_batch(trainer))
    rollout = trainer.collect()
    batch = trainer.estimate_advantages(rollout, *trainer.shape_rewards(rollout))
    updater = trainer.updater
    updater.accumulate(batch, torch.arange(8), 0, 0.0)
    assert set(estimate.models) == {"policy", "critic"} | (set() if lora else {"reference"})
    for name in ("policy", "critic"):
        model, memory = getattr(trainer.actors, name), estimate.models[name]
        storages = {p.untyped_storage().data_ptr(): p for p in model.parameters()}.values()
        averages = (updater.averages or {}).values() if name == "policy" else ()
        assert memory.weights == nbytes(storages) + nbytes(averages)
        assert memory.gradients == nbytes(p.grad for p in model.parameters() if p.grad is not None)
        updater.optimizers[name].step()
        states = updater.optimizers[name].state.values()
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

    def score():
        sequences = part.sequence_ids[:1].repeat(8, 1).tolist()  # of a rollout
        score_sequences(trainer.actors.scorer.model, sequences, 32)

    score()
    assert estimate.scoring == pytest.approx(most_allocated(score), rel=0.1)


def test_copy_of_a_checkpoint_that_a_thread_writes_is_counted(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    part = longest_micro_batch(trainer)
    assert "checkpoint" not in estimate_memory(trainer, part).models
    trainer.config.checkpoint.background = True
    models = estimate_memory(trainer, part).models
    trained = [p for model in trainer.updater.trainable.values() for p in model.values()]
    trained += (trainer.updater.averages or {}).values()
    adam = models["policy"].adam + models["critic"].adam
    assert models["checkpoint"] == ModelMemory(nbytes(trained) + adam)


def test_copy_for_a_checkpoint_that_does_not_fit_into_main_memory_is_told(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    copied = checkpoint_bytes(trainer)
    for free, status in ((2 * copied, "ok"), (1.1 * copied, "WARN"), (0.9 * copied, "FAIL")):
        finding = examine_main_memory(copied, int(free))
        assert finding.status == status
        assert (finding.override == "checkpoint.background=false") == (status != "ok")


def test_the_copy_and_the_cache_of_graph_stay_during_training(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    part, policy = longest_micro_batch(trainer), trainer.actors.policy
    loop = estimate_memory(trainer, part)
    planned = "graph", torch.bfloat16
    before = estimate_memory(trainer, part, planned=planned)
    use_engine(policy, "graph", dtype=torch.bfloat16)
    graph = estimate_memory(trainer, part)
    cache = 8 * part.sequence_ids.shape[1] * cache_bytes_per_token(policy, part, torch.bfloat16)
    copied = nbytes({p.data_ptr(): p for p in policy.parameters()}.values()) // 2
    assert graph.models["sampler"] == ModelMemory(cache + copied)
    assert "sampler" not in loop.models
    assert before.models == graph.models and before.sampling < loop.sampling


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_that_is_planned_counts_as_the_copy_does(tied):
    model = tiny_model("llama", tiny_tokenizer(), tie_word_embeddings=tied)
    adapted = add_lora(model, PeftConfig(enabled=True, r=4), "CAUSAL_LM", 0)
    copied = use_engine(adapted, dtype=torch.bfloat16).copy
    assert copy_bytes(adapted, torch.bfloat16) == model_memory(copied).weights


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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("chunk", [64, 1024])
def test_activations_are_estimated_within_a_tenth(policy_dir, tmp_path, family, attention, chunk):
    config = make_config(policy_dir, tmp_path, micro_batch_size=4, chunk_tokens=chunk)
    trainer = make_trainer(config, tmp_path)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 256}
    model = tiny_model(family, trainer.actors.tokenizer, vocab_size=2000, **sizes)
    model.set_attn_implementation(attention)
    disable_dropout(model)
    trainer.actors.policy = model
    choose_chunk_tokens(model, chunk)
    trainer.sampling = dataclasses.replace(trainer.sampling, max_new_tokens=96)
    part = longest_micro_batch(trainer)

    def step():
        logprobs, _ = policy_logprobs(model, part, trainer.sampling, with_entropy=True)
        logprobs.sum().backward()

    step()  # gradients exist from here on
    assert len(part) == 4
    estimate = estimate_memory(trainer, part).models["policy"].activations
    actual = most_allocated(step)
    assert 0.9 < estimate / actual <= 1.02, (estimate, actual)


@pytest.mark.parametrize("lora", [False, True])
def test_the_pass_over_the_prompts_is_estimated_within_a_tenth(policy_dir, tmp_path, lora):
    trainer = make_trainer(make_config(policy_dir, tmp_path, response_length=2), tmp_path)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 256}
    model = tiny_model("llama", trainer.actors.tokenizer, **sizes)
    if lora:
        model = add_lora(model, PeftConfig(enabled=True, r=4), "CAUSAL_LM", 0)
    model.gradient_checkpointing_enable()
    disable_dropout(model)
    trainer.actors.policy, trainer.prompts = model, [{"prompt": "", "input_ids": [5] * 100}]
    estimate = estimate_memory(trainer, longest_micro_batch(trainer)).sampling
    prompts = [[number, *[5] * 99] for number in range(3, 11)]  # different ones

    def sample():
        generate(model, prompts, trainer.sampling, None)

    sample()
    actual = most_allocated(sample)
    assert 0.9 < estimate / actual < 1.1, (estimate, actual)


def live_bytes():
    """Bytes of all tensors that Python still knows."""
    gc.collect()
    found = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def test_the_estimate_keeps_no_activations(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    part = longest_micro_batch(trainer)
    for name in ("sequence_ids", "sequence_mask", "state_positions"):
        getattr(part, name)  # the part keeps these from when they are first read
    before = live_bytes()
    estimate_memory(trainer, part)
    assert live_bytes() == before


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
        "weights: set ppo.share_base=true or model.dtype=bfloat16",
    ),
    (
        {"weights": 300, "adam": 10},
        {"lora": True, "dtype": "bfloat16"},
        "weights: set ppo.share_base=true or model.quantization=4bit",
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
            "share_base": True,
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
    config.ppo.share_base = knobs.get("share_base", False)
    estimate = estimate_of(**sizes)
    assert estimate.total == sum(sizes.values())
    for room, status in ((1.01, "WARN"), (0.99, "FAIL"), (1.2, "ok")):
        finding = examine_memory(estimate, int(room * estimate.total), config)
        assert finding.status == status
        assert (remedy in finding.remedy) == (status != "ok")


def test_policy_and_critic_step_one_after_the_other_and_sampling_has_no_gradients():
    policy, critic = ModelMemory(10, 20, 40, 500), ModelMemory(1, 2, 4, 300)
    assert MemoryEstimate({"policy": policy, "critic": critic}, 400).total == 77 + 500
    assert MemoryEstimate({"policy": policy, "critic": critic}, 600).total == 55 + 600


def test_a_scorer_that_needs_most_is_given_fewer_rows(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    estimate = MemoryEstimate({"policy": ModelMemory(10)}, 400, 600)
    assert estimate.total == 10 + 600
    finding = examine_memory(estimate, 500, config)
    assert finding.status == "FAIL" and "scorer's pass: set scorer.batch_size=16" in finding.remedy


def test_a_run_that_cannot_fit_fails_without_trying_the_step(
    policy_dir, tmp_path, capsys, monkeypatch
):
    trainer = scored_by(policy_dir, tmp_path, letters)
    monkeypatch.setattr(examine, "free_bytes", lambda device: 1000)
    found, bottom, message = look(trainer, capsys)
    assert found["memory"][0] == "FAIL" and "longest step" not in found
    assert bottom.startswith("preflight: failed: memory (")
    assert "memory: about" in message and "peft=lora" in message


def test_adam_states_count_on_top_of_the_measured_step(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    part, estimate = longest_micro_batch(trainer), estimate_of(adam=300)
    step = dataclasses.replace(measure_step(trainer, part), rise=500)
    for free, status in ((1000, "ok"), (900, "WARN"), (700, "FAIL")):
        assert examine_longest_step(step, estimate, free, part, trainer.config).status == status


def test_running_out_of_memory_is_a_failed_check_with_the_remedy(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, batch_size=1024, micro_batch_size=1024)
    config.ppo.num_mini_batches = 1
    trainer = make_trainer(config, tmp_path)
    part, critic, seen = longest_micro_batch(trainer), trainer.actors.critic, []

    def take_too_much(*_):
        """Allocate what no machine has, after the critic's backward pass."""
        if torch.is_grad_enabled():
            seen.append(any(p.grad is not None for p in critic.parameters()))
            torch.empty(1 << 60)

    hook = trainer.actors.policy.model.norm.register_forward_hook(take_too_much)
    step = measure_step(trainer, part)
    hook.remove()
    assert step.problem == "out of memory" and seen == [True]
    for model in (trainer.actors.policy, critic):
        assert all(p.grad is None for p in model.parameters())
    finding = examine_longest_step(step, estimate_of(activations=9), 10**9, part, config)
    assert finding.status == "FAIL" and "ppo.micro_batch_size=512" in finding.remedy
    assert measure_step(trainer, part).problem == ""


def test_logits_are_counted_where_the_head_is_in_slices(policy_dir, tmp_path, monkeypatch):
    trainer = make_trainer(make_config(policy_dir, tmp_path, chunk_tokens=4), tmp_path)
    part = longest_micro_batch(trainer)
    monkeypatch.setattr(memory, "prefill_bytes", lambda *_: 0)
    monkeypatch.setattr(memory, "cache_bytes_per_token", lambda *_: 0)

    def counted():
        return memory.further_logits(trainer, part), memory._sampling(trainer, part, {}, 8, None)

    whole, weight = counted(), trainer.actors.policy.get_output_embeddings().weight
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)  # as in DeepSpeed's slices
    assert counted() == whole


@pytest.mark.parametrize("engine", ["loop", "graph"])
@pytest.mark.parametrize("copied", [False, True])
def test_the_cache_counts_in_the_type_in_which_it_is_kept(
    engine, copied, policy_dir, tmp_path, monkeypatch
):
    rounding = partial(Accelerator, mixed_precision="bf16")  # passes of a policy in float32
    monkeypatch.setattr(tiny_ppo, "Accelerator", rounding)
    AcceleratorState._reset_state()
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    part, caches, counted = longest_micro_batch(trainer), [], []
    policy = trainer.actors.policy
    sampler = use_engine(policy, engine, dtype=torch.bfloat16 if copied else None)
    count, new = memory.cache_bytes_per_token, token_loop.roomy_cache
    monkeypatch.setattr(
        memory, "cache_bytes_per_token", lambda *given: counted.append(count(*given)) or 0
    )
    monkeypatch.setattr(
        token_loop, "roomy_cache", lambda config: caches.append(new(config)) or caches[-1]
    )
    estimate_memory(trainer, part)
    trainer.collect()
    AcceleratorState._reset_state()
    kept = sampler._steps._buffers if engine == "graph" else caches[-1].layers[0]
    sizes = [
        x[0].element_size() if isinstance(x, list) else x.element_size()
        for x in (kept.keys, kept.values)
    ]
    settings = policy.config
    numbers = settings.num_hidden_layers * settings.num_key_value_heads * settings.head_dim
    assert counted == [numbers * sum(sizes)]
    assert sum(sizes) == (4 + 2 if engine == "loop" and not copied else 2 + 2)
