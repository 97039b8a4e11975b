"""rlhf.export on tiny models: adapters, checkpoints of runs, precision, what is kept and refused.

Run: python -m pytest tests/commands/test_export.py
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tiny_ppo import make_config
from helpers.tiny_sft import sft_config
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf import train_ppo, train_sft
from rlhf.checkpoint import hash_weights, make_record, read_record, write_stage
from rlhf.checkpoint.disk import write_manifest
from rlhf.config import EvaluationConfig, ModelConfig, StageConfig
from rlhf.config import PeftConfig as LoraSettings
from rlhf.export import ExportOptions, export
from rlhf.models import init_reward_model, load_reward_model
from rlhf.option_parser import run_command
from rlhf.tokenizer import load_tokenizer

IDS = torch.tensor([[40, 41, 42, 43, 44, 7, 9, 100]])
LORA = LoraSettings(enabled=True, r=4, alpha=8)


def write(directory, model, tokenizer, stage, **values):
    record = make_record(stage, StageConfig(), None, tokenizer, "conversation")
    for name, value in values.items():
        setattr(record, name, value)
    write_stage(directory, model, tokenizer, StageConfig(), record)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An SFT stage directory with a template of its own."""
    directory = tmp_path_factory.mktemp("runs") / "mine" / "sft" / "final"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    return write(directory, tiny_model("llama", tokenizer), tokenizer, "sft")


@pytest.fixture(scope="module")
def reward(tmp_path_factory, base):
    config = ModelConfig(path=str(base))
    tokenizer = load_tokenizer(config)
    directory = tmp_path_factory.mktemp("runs") / "reward" / "final"
    model = init_reward_model(config, tokenizer, seed=3)
    return write(directory, model, tokenizer, "reward", score_mean=0.5, score_std=2.0)


def with_adapters(model, task_type, **settings):
    """LoRA whose effect is large: both factors are random."""
    torch.manual_seed(0)
    lora = LoraConfig(task_type=task_type, r=4, target_modules="all-linear", **settings)
    model = get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def exported(path, folder, **options):
    out = folder / "out"
    export(ExportOptions(path=str(path), out=str(out), **options))
    return out


def tensors(directory):
    return load_file(directory / "model.safetensors")


def exact(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


# --- Adapter directories --------------------------------------------------------------------------


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_merged_adapter_gives_the_logits_of_the_live_one(base, own_tokenizer, tmp_path):
    model = with_adapters(AutoModelForCausalLM.from_pretrained(base), "CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    if own_tokenizer:
        tokenizer.save_pretrained(tmp_path / "adapter")
    out = exported(tmp_path / "adapter", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert (logits(model) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
    assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
    assert not (out / "adapter_config.json").exists()
    ours = AutoTokenizer.from_pretrained(out)
    assert ours.chat_template == tokenizer.chat_template
    assert ours.get_vocab() == tokenizer.get_vocab()


def test_merged_reward_adapter_gives_the_scores_of_the_live_one(base, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = with_adapters(model, "SEQ_CLS", exclude_modules=["score"], modules_to_save=["score"])
    model.save_pretrained(tmp_path / "adapter")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(base)
    plain = load_reward_model(ModelConfig(path=str(exported(tmp_path / "adapter", tmp_path))))
    assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


# --- Stage directories and precision --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["base", "reward"])
def test_stage_directory_is_rounded_but_for_the_head_and_keeps_its_record(kind, request, tmp_path):
    directory = request.getfixturevalue(kind)
    out = exported(directory, tmp_path, dtype="bfloat16")
    before, after = tensors(directory), tensors(out)
    assert before.keys() == after.keys()
    for name, value in before.items():
        head = name.startswith("score.")
        exact(after[name], value if head else value.bfloat16())
    assert ("score.weight" in before) == (kind == "reward")
    for name in ("config.yaml", "chat_template.jinja"):
        assert (out / name).read_bytes() == (directory / name).read_bytes()
    ours, theirs = read_record(out), read_record(directory)
    assert (ours.dtype, ours.weights) == ("bfloat16", hash_weights(out))
    assert dataclasses.replace(ours, dtype=theirs.dtype, weights=theirs.weights) == theirs
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_rounded_reward_model_is_loaded_with_its_head_in_float32(reward, tmp_path):
    out = exported(reward, tmp_path, dtype="bfloat16")
    model = load_reward_model(ModelConfig(path=str(out), dtype="auto"))
    assert model.dtype == torch.bfloat16
    exact(model.score.weight.data, tensors(reward)["score.weight"])


def test_without_dtype_weights_are_those_that_are_stored(base, tmp_path):
    exact(tensors(exported(base, tmp_path)), tensors(base))


# --- Checkpoints of runs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "lora_averages",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("full", "lora", "averages")),
    ],
)
def test_ppo_checkpoint_gives_the_policy_after_that_update(kind, policy_dir, tmp_path, capsys):
    def run(name, num_updates):
        decay = 0.5 if "averages" in kind else None
        config = make_config(
            policy_dir, tmp_path, num_updates=num_updates, lr_schedule="constant", ema_decay=decay
        )
        peft = dataclasses.replace(LORA if "lora" in kind else LoraSettings(), save="merged")
        last = EvaluationConfig(every=2, num_prompts=4, select="last")
        return train_ppo(dataclasses.replace(config, run_name=name, peft=peft, evaluation=last))

    short, long = run("short", 2), run("long", 3)
    capsys.readouterr()
    out = exported(long.directory.parent / "checkpoint-2", tmp_path)
    assert "generation config" not in capsys.readouterr().out  # it is PPO's own
    exact(tensors(out), tensors(short.directory))
    assert any((tensors(out)[n] != w).any() for n, w in tensors(long.directory).items())
    AutoModelForCausalLM.from_pretrained(out)
    ours, theirs = read_record(out), read_record(short.directory)
    assert ours.metrics == {"update": 2}
    assert theirs.forward
    known = dataclasses.replace(theirs, metrics={}, forward=None, sampling=None)  # not in one
    assert dataclasses.replace(ours, metrics={}) == known


@pytest.mark.parametrize("kind", ["full", "lora", "lora_from_scratch"])
def test_sft_checkpoint_gives_the_policy_after_that_step(kind, policy_dir, tmp_path):
    shape = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 2048,
    }
    own = ModelConfig(path=str(policy_dir))
    if kind == "lora_from_scratch":
        own = ModelConfig(config=shape, tokenizer=str(policy_dir))
    values = {"model": own, "peft": LoraSettings() if kind == "full" else LORA}
    values["dataset"] = dataclasses.replace(sft_config(tmp_path, "x", 1).dataset, max_length=64)

    def run(name, max_steps):
        return train_sft(dataclasses.replace(sft_config(tmp_path, name, max_steps), **values))

    short, long = run("short", 2), run("long", 3)
    out = exported(long.directory.parent / "checkpoint-2", tmp_path)
    exact(tensors(out), tensors(short.directory))
    assert any((tensors(out)[n] != w).any() for n, w in tensors(long.directory).items())
    assert read_record(out).prompts == read_record(short.directory).prompts == "text"


# --- What is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(policy_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = train_ppo(make_config(policy_dir, folder, num_updates=3))
    return result.directory.parent / "checkpoint-2"


def refusal(capsys, *arguments):
    status = run_command("usage", ExportOptions, export, list(arguments))
    output, errors = capsys.readouterr()
    (line,) = errors.splitlines()
    assert (status, output) == (2, "")
    return line.removeprefix("error: ")


def test_directory_in_use_is_refused_and_kept(base, tmp_path, capsys):
    taken = tmp_path / "out"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    message = refusal(capsys, f"path={base}", f"out={tmp_path / 'out'}")
    assert message == f"out={taken} exists and is not empty; choose another"
    assert (taken / "notes.txt").read_text() == "mine"


def test_an_empty_directory_is_filled(base, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    status = run_command(
        "usage", ExportOptions, export, [f"path={base}", f"out={tmp_path / 'out'}"]
    )
    output, errors = capsys.readouterr()
    assert (status, errors) == (0, "")
    first, *usage = output.splitlines()
    size = (tmp_path / "out/model.safetensors").stat().st_size / 1e6
    assert first.startswith(f"saved {tmp_path / 'out'}: LlamaForCausalLM, ")
    assert first.endswith(f" parameters, float32, {size:.1f} MB")
    assert f"  python -m rlhf.chat path={tmp_path / 'out'}" in usage


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["out=x"],
            "path is missing; add path=<checkpoint-N of an SFT or PPO run, or a model or PEFT "
            "adapter (directory or Hub id)>",
        ),
        (["path=.", "out="], "out is missing; add out=<directory to write; new or empty>"),
        (["path=nowhere", "out=x"], "path=nowhere: no such directory"),
        (["paht=x"], "unknown option 'paht'. Did you mean path? (--help lists the options)"),
        (
            ["path=.", "out=x", "dtype=float61"],
            "dtype must be one of auto, float32, bfloat16, float16, q8_0, got 'float61'",
        ),
    ],
)
def test_wrong_options_are_one_line(arguments, message, capsys):
    assert refusal(capsys, *arguments) == message


def test_a_run_directory_is_told_which_directory_was_meant(base, tmp_path, capsys):
    run = base.parents[1]
    message = refusal(capsys, f"path={run}", f"out={tmp_path / 'out'}")
    assert message == (
        f"path={run} is not a model directory (no config.json); did you mean {base.resolve()}?"
    )


def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path, capsys):
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    content = bytearray((copy / "policy.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "policy.safetensors").write_bytes(content)
    message = refusal(capsys, f"path={copy}", f"out={tmp_path / 'out'}")
    assert message.startswith(f"path={copy} is damaged or incomplete: the content of policy.safe")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_whose_base_is_gone_says_where_to_go(policy_dir, tmp_path, capsys):
    moved = shutil.copytree(policy_dir, tmp_path / "moved")
    result = train_ppo(make_config(moved, tmp_path, num_updates=3))
    shutil.rmtree(moved)
    capsys.readouterr()  # what the run said
    path = result.directory.parent / "checkpoint-2"
    message = refusal(capsys, f"path={path}", f"out={tmp_path / 'out'}")
    assert f"model.path={moved}: no such directory" in message
    assert message.endswith("from the folder where the run was started: export from that folder")


def test_a_checkpoint_of_the_reward_stage_is_refused(checkpoint, tmp_path, capsys):
    copy = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("manifest.json"))
    write_manifest(copy, {"run": {"id": "a", "stage": "reward"}})
    message = refusal(capsys, f"path={copy}", f"out={tmp_path / 'out'}")
    assert message.startswith(f"path={copy} is a checkpoint of the reward stage; only sft")
