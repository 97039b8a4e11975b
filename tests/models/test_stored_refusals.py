"""What cannot be loaded as what it is ends in one line: pickles, weights that do not fit, damaged
files, adapters without a base, models of the wrong kind.

Run: python -m pytest tests/models/test_stored_refusals.py
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import re
import shutil

import huggingface_hub
import pytest
import torch
from helpers.checkpoints import take_back_end
from helpers.families import TOKENIZER
from helpers.stored import adapted, classifier, policy, write
from helpers.tiny import tiny_model
from helpers.tiny_sft import sft_config
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

from rlhf import train_sft
from rlhf.checkpoint import read_manifest
from rlhf.checkpoint.disk import write_manifest
from rlhf.config import InputError, ModelConfig, PeftConfig
from rlhf.export import ExportOptions, export
from rlhf.models import init_reward_model, load_policy, load_reward_model
from rlhf.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """model/, classifier/, adapter/ on model/, and reward_adapter/ on model/."""
    folder = tmp_path_factory.mktemp("originals")
    base = write(folder / "model", tiny_model("llama", TOKENIZER))
    write(folder / "classifier", classifier())
    write(folder / "adapter", adapted(policy(base), task_type="CAUSAL_LM"), base)
    live = adapted(classifier(), task_type="SEQ_CLS", modules_to_save=["score"])
    write(folder / "reward_adapter", live, base)
    return folder


@pytest.fixture
def world(originals, tmp_path, monkeypatch):
    """A copy of the originals, in which the adapters name their base as model/."""
    folder = tmp_path / "world"
    shutil.copytree(originals, folder)
    monkeypatch.chdir(folder)
    for name in ("adapter", "reward_adapter"):
        edit(folder / name / "adapter_config.json", base_model_name_or_path="model")
    return folder


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


class Trap:
    """A pickle that leaves a file behind when something loads it."""

    def __reduce__(self):
        return open, ("sprung", "w")


def to_pickle(safetensors, name):
    """Put a pickle that runs code in the place of a safetensors file."""
    safetensors.unlink()
    (safetensors.parent / name).write_bytes(pickle.dumps(Trap()))


def refusal(load):
    with pytest.raises(InputError) as caught:
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def load(kind, path):
    config = ModelConfig(path=str(path))
    return {
        "policy": lambda: load_policy(config, TOKENIZER),
        "reward": lambda: init_reward_model(config, TOKENIZER, seed=0),
        "scorer": lambda: load_reward_model(config),
        "export": lambda: export(ExportOptions(path=str(path), out="out")),
    }[kind]()


FIELD = {"policy": "model.path", "reward": "model.path", "scorer": "scorer.path", "export": "path"}


# --- Pickles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["policy", "reward", "export"])
def test_a_pickled_adapter_is_refused_next_to_any_safetensors_file(kind, world):
    save_file({"x": torch.zeros(1)}, world / "adapter/other.safetensors")
    to_pickle(world / "adapter/adapter_model.safetensors", "adapter_model.bin")
    message = refusal(lambda: load(kind, "adapter"))
    assert message.startswith(f"{FIELD[kind]}=adapter has pickled weights (adapter_model.bin)")
    assert not (world / "sprung").exists()


@pytest.mark.parametrize("kind", ["scorer", "export"])
def test_a_pickled_classifier_adapter_is_refused(kind, world):
    to_pickle(world / "reward_adapter/adapter_model.safetensors", "adapter_model.bin")
    message = refusal(lambda: load(kind, "reward_adapter"))
    assert message.startswith(f"{FIELD[kind]}=reward_adapter has pickled weights")
    assert not (world / "sprung").exists()


@pytest.mark.parametrize("path, kind", [("adapter", "policy"), ("adapter", "reward"),
    ("adapter", "export"), ("reward_adapter", "scorer"), ("reward_adapter", "export")])  # fmt: skip
def test_a_pickled_base_under_an_adapter_is_refused(path, kind, world):
    to_pickle(world / "model/model.safetensors", "pytorch_model.bin")
    message = refusal(lambda: load(kind, path))
    assert message.startswith(f"{FIELD[kind]}={path} (an adapter on model) has pickled weights")
    assert "pytorch_model.bin" in message and not (world / "sprung").exists()


def test_weights_that_the_configuration_names_must_be_safetensors(world):
    edit(world / "model/config.json", transformers_weights="adapter_model.bin")
    to_pickle(world / "model/model.safetensors", "adapter_model.bin")
    assert "adapter_model.bin is not a safetensors file" in refusal(lambda: load("policy", "model"))
    assert not (world / "sprung").exists()


# --- Weights that do not fit --------------------------------------------------------------------


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("path, kind", [("adapter", "policy"), ("adapter", "reward"),
    ("adapter", "export"), ("reward_adapter", "scorer"), ("reward_adapter", "export")])  # fmt: skip
def test_an_adapter_whose_names_match_nothing_is_refused(path, kind, world):
    def rename(tensors):
        for name in list(tensors):
            if "lora_" in name:
                tensors[name.replace(".layers.", ".blocks.")] = tensors.pop(name)

    rewrite(world / path / "adapter_model.safetensors", rename)
    message = refusal(lambda: load(kind, path))
    assert message.startswith(f"{FIELD[kind]}={path}: the adapter in {path} does not fit the model")
    assert "there are no weights for base_model.model.model.layers.0.self_attn.q_proj" in message
    assert "no place for base_model.model.model.blocks.0.self_attn.q_proj" in message
    assert "and 5 more" in message


def test_an_adapter_without_one_of_its_tensors_is_refused(world):
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    rewrite(world / "adapter/adapter_model.safetensors", lambda tensors: tensors.pop(name))
    assert "no weights for base_model.model.model.layers.1.self_attn.v_proj.lora_B" in refusal(
        lambda: load("policy", "adapter")
    )


def test_an_adapter_of_other_shapes_is_refused(world):
    edit(world / "adapter/adapter_config.json", r=4)
    message = refusal(lambda: load("policy", "adapter"))
    assert "the adapter in adapter does not fit the model" in message and "size mismatch" in message


def test_an_adapter_for_layers_that_the_base_lacks_is_refused(world):
    edit(world / "adapter/adapter_config.json", target_modules=["c_attn"])
    assert "the adapter in adapter does not fit LlamaForCausalLM" in refusal(
        lambda: load("policy", "adapter")
    )


@pytest.mark.parametrize("path, kind", [("adapter", "policy"), ("adapter", "export"),
    ("reward_adapter", "scorer")])  # fmt: skip
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "uses layers of its base several times"),
        ({"init_lora_weights": "pissa_niter_4"}, "from which random numbers were taken"),
    ],
    ids=str,
)
def test_an_adapter_whose_base_was_changed_is_refused(settings, message, path, kind, world):
    edit(world / path / "adapter_config.json", **settings)
    assert message in refusal(lambda: load(kind, path))


def test_an_adapter_that_cannot_be_merged_is_refused(world):
    settings = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    settings |= {"base_model_name_or_path": "model", "token_dim": 32, "num_layers": 2}
    settings |= {"num_transformer_submodules": 1, "num_attention_heads": 4}
    (world / "adapter/adapter_config.json").write_text(json.dumps(settings))
    assert "PROMPT_TUNING cannot be merged" in refusal(lambda: load("policy", "adapter"))


@pytest.mark.parametrize("kind", ["policy", "reward", "export"])
def test_a_weight_that_the_model_does_not_take_is_refused(kind, world):
    rewrite(
        world / "model/model.safetensors",
        lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(3, 3)}),
    )
    message = refusal(lambda: load(kind, "model"))
    assert message.startswith(f"{FIELD[kind]}=model does not fit Llama")
    assert "no place for model.layers.7.mlp.up_proj.weight" in message


@pytest.mark.parametrize("kind", ["policy", "reward", "export"])
def test_a_weight_of_another_shape_is_refused(kind, world):
    rewrite(
        world / "model/model.safetensors",
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}),
    )
    message = refusal(lambda: load(kind, "model"))
    assert "other shapes: model.norm.weight (stored (5,), expected (32,))" in message


def test_missing_weights_below_the_head_of_a_reward_model_are_refused(world):
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(world / "classifier/model.safetensors", lambda tensors: tensors.pop(name))
    message = refusal(lambda: load("scorer", "classifier"))
    assert message.startswith("scorer.path=classifier does not fit LlamaForSequenceClassification")
    assert f"there are no weights for {name}" in message


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": "0.7"}, "temperature .* must be a finite number, got '0.7'"),
        ({"top_p": math.nan}, "top_p .* must be a finite number, got nan"),
        ({"do_sample": "true"}, "do_sample .* must be true or false, got 'true'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["policy", "export"])
def test_sampling_settings_that_are_no_numbers_are_refused(kind, values, message, world):
    edit(world / "model/generation_config.json", **values)
    assert re.search(rf"^{FIELD[kind]}=model: {message}", refusal(lambda: load(kind, "model")))


@pytest.mark.parametrize("kind", ["policy", "reward", "export"])
def test_a_configuration_that_fails_in_arithmetic_is_refused(kind, world):
    edit(world / "model/config.json", num_attention_heads=0)
    assert refusal(lambda: load(kind, "model")).startswith(f"{FIELD[kind]}=model cannot be loaded")


# --- The wrong kind of model --------------------------------------------------------------------


@pytest.mark.parametrize("path", ["classifier", "reward_adapter"])
@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_a_classifier_is_no_language_model(kind, path, world):
    assert refusal(lambda: load(kind, path)).startswith(
        f"model.path={path} is a sequence classifier"
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_classifier_without_a_name_in_its_configuration_is_no_language_model(family, world):
    """GPT-2's output table is tied: nothing is missing, only the head is left over."""
    values = {"n_layer": 2, "n_embd": 32, "n_head": 4} if family == "gpt2" else {}
    path = write(world / "unnamed", classifier(family, **values))
    edit(path / "config.json", architectures=None)
    assert "score.weight" in refusal(lambda: load("policy", path))
    assert "is a sequence classifier" in refusal(lambda: load("reward", path))


@pytest.mark.parametrize("path", ["model", "adapter"])
def test_a_language_model_is_no_reward_model(path, world):
    message = refusal(lambda: load("scorer", path))
    assert message.startswith(f"scorer.path={path}: there are no weights for score.weight")
    assert "scorer.path=my_scorer.score" in message


def test_two_labels_are_refused_with_a_way_out(world):
    write(world / "two", classifier(num_labels=2))
    message = refusal(lambda: load("scorer", "two"))
    assert "score.weight (stored (2, 32), expected (1, 32))" in message
    assert "scorer=python scorer.path=my_scorer.score" in message


def test_an_encoder_is_no_critic(world):
    write(world / "encoder", classifier("bert"))
    message = refusal(lambda: load("scorer", "encoder"))
    assert "BertForSequenceClassification scores a text as a whole" in message
    assert "critic.init=policy" in message


# --- Adapters and their base --------------------------------------------------------------------


@pytest.mark.parametrize(
    "base, message",
    [
        ("./nowhere", "base_model_name_or_path=./nowhere: no such directory"),
        ("nobody/nothing", "base_model_name_or_path=nobody/nothing cannot be loaded"),
        (None, "does not name the adapter's base model"),
        ("adapter", "names an adapter as its own base, adapter"),
    ],
)
def test_an_adapter_whose_base_is_not_there_is_refused(base, message, world):
    edit(world / "adapter/adapter_config.json", base_model_name_or_path=base)
    for task in (
        lambda: load("policy", "adapter"),
        lambda: load_tokenizer(ModelConfig(path="adapter")),
    ):
        found = refusal(task)
        assert found.startswith("model.path=adapter") and message in found


def test_a_whole_model_and_an_adapter_in_one_directory_are_refused(world):
    shutil.copy("model/model.safetensors", "adapter/model.safetensors")
    assert "holds both an adapter and a whole model" in refusal(lambda: load("policy", "adapter"))


def test_an_adapter_on_a_quantised_base_is_refused(world):
    edit(world / "model/config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "its base model is stored quantised" in refusal(lambda: load("policy", "adapter"))


# --- Damaged files ------------------------------------------------------------------------------


def cut(file, size):
    with file.open("r+b") as stream:
        stream.truncate(size)


def shards_without_the_second(folder):
    tensors = load_file(folder / "model.safetensors")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = {name: first if i % 2 else second for i, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    os.rename(folder / "model.safetensors", folder / first)


DAMAGES = {
    "model.safetensors": [
        lambda folder: cut(folder / "model.safetensors", 3000),
        lambda folder: cut(folder / "model.safetensors", 60000),
        lambda folder: cut(folder / "model.safetensors", 0),
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs"),
    ],
    "model-00002-of-00002.safetensors": [shards_without_the_second],
    "model.safetensors.index.json": [
        lambda folder: (
            os.remove(folder / "model.safetensors"),
            (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
        )
    ],
    "config.json": [
        lambda folder: (folder / "config.json").write_bytes(b"{"),
        lambda folder: (folder / "config.json").write_bytes(b'{"a": "\xff"}'),
        lambda folder: (folder / "config.json").write_bytes(b"[1]"),
        lambda folder: (folder / "config.json").write_bytes(b""),
    ],
    "generation_config.json": [
        lambda folder: (folder / "generation_config.json").write_bytes(b"\xff")
    ],
}


@pytest.mark.parametrize("kind", ["policy", "reward", "export"])
@pytest.mark.parametrize("file, damage", [(f, d) for f, all in DAMAGES.items() for d in all])
def test_a_damaged_file_is_named(file, damage, kind, world):
    damage(world / "model")
    for path in ("model", "adapter"):
        message = refusal(lambda path=path: load(kind, path))
        assert f"model/{file}" in message
        assert "is damaged" in message or "is missing" in message


NO_JSON = [b"{", b"\xff", b"[1]", b""]
NO_TOKENIZER = [b'{"model": {"type": "none"}}', b'{"model": {}, "added_tokens": []}']


@pytest.mark.parametrize(
    "name, content",
    [(name, c) for name in ("tokenizer.json", "tokenizer_config.json") for c in NO_JSON]
    + [("tokenizer.json", content) for content in NO_TOKENIZER],
)
def test_a_damaged_tokenizer_is_named(name, content, world):
    (world / "model" / name).write_bytes(content)
    message = refusal(lambda: load_tokenizer(ModelConfig(path="model")))
    assert message.startswith(f"model.path=model cannot be loaded: model/{name} is damaged")


def test_a_directory_without_a_tokenizer_says_so(world):
    for file in (world / "model").glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refusal(lambda: load_tokenizer(ModelConfig(path="model")))


def test_a_file_in_place_of_a_directory_is_refused(world):
    message = refusal(lambda: load("policy", "model/model.safetensors"))
    assert message.endswith("is a file; give the directory that holds it: model")


# --- Checkpoints of runs --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(policy_dir, tmp_path_factory):
    """Configuration of an SFT run that left a checkpoint."""
    config = sft_config(tmp_path_factory.mktemp("stopped"), "mine", 3)
    config.model = ModelConfig(path=str(policy_dir))
    config.dataset.max_length = 64
    train_sft(config)
    take_back_end(config.stage_dir("sft"))
    return dataclasses.replace(config, resume=True)


@pytest.fixture
def resumed(stopped, tmp_path, monkeypatch):
    """A copy of that run, and its checkpoint."""
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(stopped, runs_dir=str(tmp_path / "runs"))
    shutil.copytree(stopped.runs_dir, config.runs_dir)
    return config, config.stage_dir("sft") / "checkpoint-2"


def seal_again(checkpoint):
    """Make the manifest say that what is there now was written by the run."""
    facts = read_manifest(checkpoint)
    assert facts is not None
    file = checkpoint / "manifest.json"
    file.unlink()
    write_manifest(checkpoint, {key: value for key, value in facts.items() if key != "files"})


@pytest.mark.parametrize(
    "name, content",
    [("optimizer.pt", pickle.dumps(Trap())), ("scheduler.pt", b"no pickle at all"),
     ("rng_state.pth", b"")],
)  # fmt: skip
def test_a_state_that_is_no_tensors_ends_the_resume_in_one_line(content, name, resumed):
    config, checkpoint = resumed
    (checkpoint / name).write_bytes(content)
    seal_again(checkpoint)
    message = refusal(lambda: train_sft(config))
    assert message.startswith(f"{checkpoint}: a state in its .pt or .pth files")
    assert f"delete {checkpoint}" in message
    assert not os.path.exists("sprung")


def test_pickled_weights_in_a_checkpoint_end_the_resume_in_one_line(resumed):
    config, checkpoint = resumed
    to_pickle(checkpoint / "model.safetensors", "pytorch_model.bin")
    seal_again(checkpoint)
    message = refusal(lambda: train_sft(config))
    assert message.startswith(f"{checkpoint} holds pickled weights (pytorch_model.bin)")
    assert not os.path.exists("sprung")


def test_a_lora_checkpoint_with_the_weights_of_another_adapter_is_not_exported(
    policy_dir, tmp_path
):
    lora = PeftConfig(enabled=True, r=4, target_modules=["q_proj"])
    config = dataclasses.replace(sft_config(tmp_path, "lora", 3), peft=lora)
    config.model = ModelConfig(path=str(policy_dir))
    config.dataset.max_length = 64
    train_sft(config)
    checkpoint = config.stage_dir("sft") / "checkpoint-2"

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("q_proj", "k_proj")] = tensors.pop(name)

    rewrite(checkpoint / "adapter_model.safetensors", rename)
    seal_again(checkpoint)
    message = refusal(lambda: load("export", checkpoint))
    assert "no place for base_model.model.model.layers.0.self_attn.k_proj" in message


def test_a_family_without_a_classifier_has_no_reward_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(vocab_size=len(TOKENIZER), **settings))
    write(tmp_path / "mamba", model)
    with pytest.raises(InputError, match="no sequence classifier for model_type=mamba, but"):
        init_reward_model(ModelConfig(path="mamba"), TOKENIZER, seed=0)


def test_a_misspelt_directory_is_taken_for_a_hub_id_and_the_message_names_the_nearest(
    tmp_path, monkeypatch
):
    (tmp_path / "runs/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"model\.path=runs/mien .* Did you mean runs/mine\?"):
        load_tokenizer(ModelConfig(path="runs/mien"))
