"""What a run needs, reckoned from a configuration: sizes as published, memory against a real step.

Run: python -m pytest tests/commands/test_plan.py
"""

import time
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from helpers.commands import ROOT
from helpers.stored import as_hub_id
from helpers.tiny import tiny_model, tiny_tokenizer
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.config import ModelConfig, PeftConfig
from rlhf.models import add_lora, load_policy, model_memory
from rlhf.plan.__main__ import main
from rlhf.plan.cards import Card
from rlhf.plan.counting import Measured, measure
from rlhf.plan.launches import (
    LAUNCHES,
    Setting,
    chosen_gather,
    estimate,
    gathered_per_token,
    launches,
    main_memory,
    rows_that_fit,
)
from rlhf.plan.sizes import SIZES
from rlhf.plan.work import Shape, seconds_of_gathering, seconds_of_phases, train_operations

# from the papers and model cards, 1e9
PUBLISHED = {
    "llama-7b": 6.738,
    "llama-13b": 13.016,
    "llama-33b": 32.529,
    "llama-65b": 65.286,
    "llama-2-70b": 68.977,
    "pythia-410m": 0.405,
    "pythia-1.4b": 1.415,
    "pythia-2.8b": 2.775,
    "pythia-6.9b": 6.857,
    "pythia-12b": 11.846,
    "opt-1.3b": 1.316,
    "opt-6.7b": 6.658,
    "gpt-j-6b": 6.051,
    "falcon-7b": 6.922,
    "smollm2-135m": 0.1345,
}
TINY = {
    "llama": dict(hidden_size=64, intermediate_size=160, num_hidden_layers=8),
    "gpt_neox": dict(hidden_size=64, intermediate_size=256, num_hidden_layers=8),
    "opt": dict(
        hidden_size=64, word_embed_proj_dim=64, ffn_dim=256, num_hidden_layers=8, dropout=0.0
    ),
}
SLOW_CASES = [
    ("llama", 1, False),
    ("llama", 16, False),
    ("gpt_neox", 16, False),
    ("gpt_neox", 16, True),
    ("opt", 1, True),
    ("opt", 16, True),
]
SETTING = Setting("sft", 1, 24, 40, sampled_rows=4)


def tiny(family: str) -> object:
    shape = dict(num_attention_heads=4, vocab_size=128, max_position_embeddings=128)
    return AutoConfig.for_model(family, **shape, **TINY[family])


@pytest.mark.parametrize("name", SIZES)
def test_known_sizes_have_the_published_number_of_parameters(name):
    assert Shape.of_settings(AutoConfig.for_model(**SIZES[name])).parameters == pytest.approx(
        PUBLISHED[name] * 1e9, rel=1e-3
    )


def measured_peak(family: str, rows: int, length: int, checkpointing: bool) -> int:
    """Bytes at the peak of the second training step of a real model, without its head."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(family), attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    ids = torch.randint(0, 128, (rows, length))
    with tracker:
        for _ in range(2):
            for _ in range(2):  # gradients of the first micro-batch are there in the second
                with torch.autocast("cpu", torch.bfloat16):
                    hidden = model.base_model(ids, use_cache=False).last_hidden_state
                hidden.float().sum().backward()
                tracker.reset_mod_stats()
            optimizer.step()
            optimizer.zero_grad()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize(
    "family, rows, checkpointing",
    [
        ("gpt_neox", 1, False),  # weights and Adam's states are most of it
        pytest.param("llama", 16, True, marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES),
    ],
)
def test_memory_is_that_of_a_real_step(family, rows, checkpointing):
    setting = replace(SETTING, checkpointing=checkpointing)
    model = measure(tiny(family), setting.length, lora=False, dtype="float32")
    found = estimate(model, setting, "ddp", rows)
    without_head = found.total - model.logits(rows * setting.length)
    peak = measured_peak(family, rows, setting.length, checkpointing)
    assert without_head == pytest.approx(peak, rel=0.15)


def counted(**values) -> Measured:
    """A model of round numbers."""
    given = dict(parameters=100, trained=100, weights=400, copies=30, per_row=50, input_per_row=2)
    given |= dict(passing=640)
    rest = dict(cache_per_token=1, num_blocks=5, block=10, width=8, vocabulary=0, multiplied=100)
    return Measured(**given | rest | values)


def test_each_launch_holds_what_its_scheme_says():
    eight = replace(SETTING, gpus=8)
    parts = {name: estimate(counted(), eight, name).models["model"] for name in LAUNCHES}
    sizes = {n: (p.weights, p.gradients, p.adam, p.activations) for n, p in parts.items()}
    # the gradient twice in buckets; a pass keeps 50 of a row and the copies of weights
    assert sizes["ddp"] == (400, 800, 800, 80)
    bucket = 4 * 500_000_000  # of DeepSpeed, for gradients
    # it steps a copy of the weights, with joined gradients
    assert sizes["zero2"] == (400 + 50, 2 * 50, 100, 80 + bucket)
    # all weights are fewer than it keeps gathered
    assert sizes["zero3"] == (50 + 50, 2 * 50, 100, 50 + 30 + 400 + bucket)
    assert sizes["zero3_offload"] == (0, 0, 0, 50 + 30 + 400 + bucket)
    # two blocks, the gradient of one, and the rest of 50 numbers, in float32
    assert sizes["fsdp2"] == (50, 50, 100, 50 + 30 + 4 * (3 * 10 + 50))
    assert sizes["fsdp2_offload"] == (0, 0, 0, 400)
    saving = estimate(counted(), replace(SETTING, checkpointing=True), "ddp").models["model"]
    assert saving.activations == 5 * 2 + 50 // 5 + 30 // 5  # inputs, and what one block keeps
    alone = estimate(counted(), SETTING, "ddp").models["model"]
    assert alone.gradients == 400
    files = {file.stem for file in (ROOT / "conf/accelerate").glob("*.yaml")}
    assert set(LAUNCHES) <= files


def test_ppo_holds_its_roles_and_lora_no_reference():
    ppo = replace(SETTING, stage="ppo")
    models = estimate(counted(), ppo, "ddp").models
    assert list(models) == ["policy", "critic", "reward model", "reference", "sampler"]
    assert models["reference"].weights == 200  # bfloat16
    eight = replace(ppo, gpus=8)
    assert estimate(counted(), eight, "fsdp2").models["reference"].weights == 50  # float32 slices
    assert estimate(counted(), eight, "fsdp2_offload").models["reference"].weights == 0
    assert models["sampler"].weights == 200 + 4 * 64  # and the cache of four rows
    sixteen = replace(ppo, dtype="bfloat16")
    sliced = estimate(counted(), replace(sixteen, gpus=8), "fsdp2").models["sampler"]
    assert sliced.weights == 200 + 4 * 64  # slices cannot sample
    half = estimate(counted(), sixteen, "ddp")
    assert half.models["sampler"].weights == 4 * 64  # the policy itself samples
    assert half.sampling == 4 * (24 + 640 * 24 // 64)  # four prompts of 24 of 64 tokens
    assert half.scoring == 4 * 640
    away = estimate(counted(), replace(ppo, offload_frozen=True), "ddp")
    assert list(away.models) == ["policy", "critic", "sampler"] and away.visiting == 200
    one_base = replace(ppo, lora=True, share_base=True)
    one = estimate(counted(trained=4), one_base, "ddp").models
    assert (one["critic"].weights, one["reward model"].weights, one["policy"].weights) == (
        16,
        16,
        400,
    )
    sft = replace(ppo, lora=True, share_base=True, stacked=True)
    assert estimate(counted(trained=4), sft, "ddp").models["adapter of SFT"].weights == 16
    sliced = estimate(counted(trained=4), replace(one_base, gpus=4), "fsdp2").models["policy"]
    # a quarter of the base, its adapters whole; two blocks or the rest, as stored
    assert (sliced.weights, sliced.gradients, sliced.adam) == (96 + 16, 32, 32)
    assert sliced.activations == 50 + 200 + 30
    offloaded = estimate(counted(trained=4), replace(one_base, gpus=4), "fsdp2_offload").models
    assert offloaded["policy"].weights == 16
    divided = estimate(counted(trained=4), replace(one_base, gpus=4), "zero3").models
    assert divided["policy"] == sliced
    whole = estimate(counted(trained=4), replace(one_base, gpus=4), "zero2").models["policy"]
    # a quarter of the adapters' numbers: a copy, two of gradients, two moments
    assert (whole.weights, whole.gradients, whole.adam) == (400 + 4, 8, 8)
    both = [estimate(counted(), eight, name).models for name in ("zero3", "zero3_offload")]
    assert [models["reference"].weights for models in both] == [50, 0]
    assert both[0]["policy"].activations == 50 + 30 + 4 * 3 * 50  # units, not DeepSpeed's billion
    for setting in (one_base, ppo, SETTING):
        assert launches(replace(setting, gpus=2)) == LAUNCHES
    sixteen = replace(ppo, gpus=2, dtype="bfloat16")
    assert launches(sixteen) == ("ddp", "fsdp2", "fsdp2_offload")
    assert launches(ppo) == ("ddp",)
    lora = estimate(counted(trained=4), replace(ppo, lora=True, critic=False), "ddp").models
    assert list(lora) == ["policy", "reward model", "sampler"] and lora["policy"].adam == 32


@pytest.mark.slow
def test_a_7b_base_of_all_roles_takes_14_gb_and_less_than_6_in_4_bits():
    settings = AutoConfig.for_model(**SIZES["llama-7b"])
    ppo = replace(SETTING, stage="ppo", lora=True, share_base=True, dtype="bfloat16")
    found = {}
    for packed in (None, "4bit"):
        model = measure(settings, ppo.length, True, ppo.dtype, packed)
        parts = estimate(model, replace(ppo, quantization=packed), "ddp").models
        found[packed] = [parts[role].weights / 1e9 for role in ("policy", "critic", "reward model")]
    adapters = 2 * 39_976_960 * 4 / 1e9  # of rank 16: of critic and reward model
    assert sum(found[None]) == pytest.approx(13.477 + 1.5 * adapters, abs=0.001)
    assert sum(found["4bit"]) < 6


def test_packed_weights_are_those_of_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    tokenizer = tiny_tokenizer()
    tiny_model("llama", tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), quantization="4bit")
    real = add_lora(load_policy(config, tokenizer), PeftConfig(enabled=True), "CAUSAL_LM")
    settings = AutoConfig.from_pretrained(tmp_path)
    reckoned = measure(settings, 16, True, "float32", "4bit").weights
    assert reckoned == pytest.approx(model_memory(real).weights, rel=1e-3)
    assert launches(replace(SETTING, gpus=8, quantization="4bit")) == ("ddp",)


def test_a_policy_in_slices_samples_by_layers_where_its_copy_does_not_fit():
    ppo, model = replace(SETTING, stage="ppo", gpus=8, critic=False, lora=True), counted(trained=4)
    whole = estimate(model, ppo, "fsdp2")
    merged = 2 * (100 - 4)
    assert whole.models["sampler"].weights == merged + 4 * 64 and whole.sampling == 4 * (24 + 240)
    in_layers = estimate(model, replace(ppo, gather="layers"), "fsdp2")
    # of two bytes a number: an eighth of all, and the numbers outside of blocks
    assert in_layers.models["sampler"].weights == 2 * (100 // 8 + 50)
    assert in_layers.sampling == 4 * (24 + 240)
    offloaded = estimate(model, replace(ppo, gather="layers"), "fsdp2_offload")
    assert offloaded.models["sampler"].weights == 2 * 50
    blocks = counted(block=19)  # the one in use and the next one
    in_layers = estimate(blocks, replace(ppo, gather="layers"), "zero3")
    assert in_layers.models["sampler"].weights == 2 * (100 // 8 + 2 * 19)
    sixteen = replace(ppo, gather="layers", dtype="bfloat16")
    assert "sampler" not in estimate(model, sixteen, "fsdp2").models, "the policy itself samples"
    small = counted(trained=4, passing=0, cache_per_token=9)  # the cache of whole rows is larger
    assert estimate(small, replace(ppo, gather="layers"), "fsdp2").sampling == 4 * 64 * 9
    needed = int(whole.total / 0.85)
    chosen = [chosen_gather(model, ppo, "fsdp2", needed + more) for more in (0, 1)]
    assert chosen == ["layers", "copy"]
    for gather in ("copy", "layers"):
        assert chosen_gather(model, replace(ppo, gather=gather), "fsdp2", 1) == gather
    assert chosen_gather(model, ppo, "ddp", 1) == "itself"
    assert chosen_gather(model, replace(ppo, stage="sft"), "fsdp2", 1) == "itself"
    assert gathered_per_token(model, ppo) == merged
    assert gathered_per_token(model, sixteen) == 400
    assert gathered_per_token(model, replace(sixteen, share_base=True)) == 400 - 16


def test_main_memory_has_slices_that_wait_and_the_copy_for_a_checkpoint():
    ppo, model = replace(SETTING, stage="ppo", gpus=8), counted()
    assert main_memory(model, replace(SETTING, gpus=8), "fsdp2") == 0
    copy = 2 * 3 * 400  # policy and critic: weights and two moments
    assert main_memory(model, ppo, "ddp") == main_memory(model, ppo, "fsdp2") == copy
    assert main_memory(model, ppo, "fsdp2_offload") == copy + 2 * 4 * 400
    assert main_memory(model, replace(ppo, critic=False), "fsdp2") == copy / 2
    in_layers = replace(ppo, gather="layers")
    more = [main_memory(model, in_layers, n) - main_memory(model, ppo, n) for n in LAUNCHES]
    assert more == [0, 0, 0, 200, 0, 200], "the slices of a copy wait too"
    one_base, model = replace(ppo, lora=True, share_base=True), counted(trained=4)
    assert main_memory(model, one_base, "fsdp2") == 2 * 3 * 16
    assert main_memory(model, one_base, "fsdp2_offload") == 2 * 3 * 16 + 400 - 16


def test_rows_that_fit_are_as_many_as_leave_room():
    model = counted()
    memory = 10_000
    rows = rows_that_fit(model, SETTING, "ddp", memory)
    fits = [estimate(model, SETTING, "ddp", n).total <= 0.85 * memory for n in (rows, rows + 1)]
    assert fits == [True, False]
    assert rows_that_fit(model, SETTING, "ddp", 1000) == 0


def test_time_is_the_arithmetic_and_the_traffic_of_each_phase():
    card = Card(
        tera=1e-9, bandwidth=1e-6, memory=1, link=1e-6
    )  # 1,000 operations and 1,000 bytes a second
    shape = Shape(parameters=100, multiplied=100, blocks=0, width=0, cache_per_token=0)
    sft = replace(SETTING, prompt_length=10, response_length=0)
    assert seconds_of_phases(shape, sft, card, 5, 2)["train"] == pytest.approx(60)
    assert train_operations(shape, replace(sft, lora=True), 1) == 400
    assert train_operations(shape, replace(sft, checkpointing=True), 1) == 800
    ppo = replace(SETTING, stage="ppo", prompt_length=10, response_length=10, gpus=2)
    found = seconds_of_phases(shape, ppo, card, rows=8, epochs=4)
    # 8 rows are one step on two GPUs of 4: 1,600 operations or 200 bytes; then 10 tokens
    assert found["sample"] == pytest.approx(8 * 10 * 200 / 2000 + 10 * 8 * 200 / 2000)
    assert found["score"] == pytest.approx(4 * 8 * 20 * 200 / 2000)
    assert found["train"] == pytest.approx(2 * 4 * 8 * 20 * 600 / 2000)
    # seven eighths of 800 bytes for a token; 64 rows are two steps of 8 x 4, with 10 tokens each
    eight = replace(ppo, gpus=8, sampled_rows=4)
    assert seconds_of_gathering(800, eight, card, 64) == pytest.approx((0.7, 2 * 10 * 0.7))
    slow = Card(tera=1, bandwidth=1e-6, memory=1, link=1)
    assert seconds_of_phases(shape, ppo, slow, 8, 4)["sample"] == pytest.approx(10 * 200 / 1000)


def test_command_plans_the_configuration_of_a_hub_id_without_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    tiny("llama").save_pretrained(tmp_path / "model")
    name = as_hub_id(tmp_path / "model", tmp_path / "hub")
    began = time.perf_counter()
    assert main([f"model={name}", "prompt_length=24", "response_length=40"]) == 0
    assert time.perf_counter() - began < 60, "seconds"
    out = capsys.readouterr().out
    runs = ("Alpaca 7B, SFT", "Vicuna 13B, SFT", "Dolly 12B, SFT", "InstructGPT 1.3B, PPO")
    for run in (*runs, "InstructGPT 6B, PPO", "InstructGPT's episodes at 70B, PPO"):
        assert f"\n{run} " in out
    assert out.startswith("someone/model: 0.000 B parameters")
    assert main(["model=someone/else"]) == 2
    assert capsys.readouterr().err.startswith("error: model=someone/else")


def test_command_plans_a_directory_and_names_what_it_does_not_know(tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path)
    few = ["prompt_length=24", "response_length=40"]
    assert main([f"model={tmp_path}/config.json", "gpus=2", "price_per_hour=2", *few]) == 0
    out = capsys.readouterr().out
    assert "rows of 24 + 40 tokens" in out and "fsdp2_offload" in out and "cost: about 0" in out
    assert "InstructGPT 6B, PPO" in out and "reward model" in out and "layer by" not in out
    assert main([f"model={tmp_path}/config.json", "gpus=2", "memory=0.001", *few]) == 0
    in_layers = "fsdp2 and fsdp2_offload: PPO samples without a whole copy of the policy, layer by "
    gathered = "layer; each GPU gathers 0.0 GB for each token, in at least 0.0 ms at 450 GB/s: 0.0 "
    assert in_layers + gathered + "hours more than below" in capsys.readouterr().out
    assert main([f"model={tmp_path}", "share_base=true"]) == 2
    assert "set lora=true" in capsys.readouterr().err
    assert main([f"model={tmp_path}", "quantization=4bit"]) == 2
    assert "quantization=4bit trains adapters alone; set lora=true" in capsys.readouterr().err
    assert main(["model=llama-7"]) == 2
    assert "Did you mean llama-7b" in capsys.readouterr().err
    assert main(["model=llama-7b", "card=h10"]) == 2
    assert "h100" in capsys.readouterr().err
