"""A GGUF file is a base model of every stage and command; what it leaves is ordinary safetensors.

Run: python -m pytest tests/models/test_gguf.py
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("gguf", reason="pip install 'rlhf[gguf]'")

from helpers.families import SEQUENCES, TOKENIZER, VOCAB, close, exact  # noqa: E402
from helpers.families import logits_of as all_logits_of  # noqa: E402
from helpers.gguf_files import write_gguf  # noqa: E402
from helpers.made_up_processes import assert_slices, process  # noqa: E402
from helpers.stored import as_hub_id  # noqa: E402
from helpers.tiny import tiny_model, tiny_tokenizer  # noqa: E402
from helpers.tiny_ppo import make_config  # noqa: E402
from helpers.tiny_sft import sft_config  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import rlhf.gguf_files  # noqa: E402
from rlhf import train_ppo, train_sft  # noqa: E402
from rlhf.checkpoint import hash_weights, read_record  # noqa: E402
from rlhf.config import InputError, ModelConfig, PeftConfig  # noqa: E402
from rlhf.export import ExportOptions, export  # noqa: E402
from rlhf.generate import GenerateOptions  # noqa: E402
from rlhf.generate import run as run_generate  # noqa: E402
from rlhf.inputs import check_model  # noqa: E402
from rlhf.models import init_reward_model, load_policy, shard, try_settings  # noqa: E402
from rlhf.models.unread import unread  # noqa: E402
from rlhf.tokenizer import load_tokenizer  # noqa: E402

CHAT = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def llama():
    return tiny_model("llama", TOKENIZER, num_key_value_heads=2)


def logits_of(model):
    """Without the row of `<|endoftext|>`, which transformers adds to a byte-level tokenizer."""
    return all_logits_of(model)[..., :VOCAB]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama(), tokenizer)


# --- Loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_each_process_reads_its_slice_of_a_gguf_file_tensor_by_tensor(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.models.load.loads_in_slices", lambda: True)
    model = tiny_model("llama", TOKENIZER, num_key_value_heads=2, hidden_size=64)
    config = ModelConfig(path=str(write_gguf(tmp_path / "m.gguf", model, tiny_tokenizer(), kind)))
    tokenizer = load_tokenizer(config)  # of one more token
    for rank in (0, 1):
        whole = load_policy(config, tokenizer), init_reward_model(config, tokenizer, 0)
        with process(rank):
            sliced = [
                load_policy(config, tokenizer, in_slices=True),
                init_reward_model(config, tokenizer, 0, in_slices=True),
            ]
            for model, other in zip(sliced, whole, strict=True):
                assert unread(model) and model.config.to_dict() == other.config.to_dict()
                shard(model)
                assert_slices(model, other, rank)


def test_a_gguf_file_is_the_model_that_was_written_into_it(file, tmp_path):
    config = ModelConfig(path=str(file))
    tokenizer = load_tokenizer(config)
    assert tokenizer.chat_template == CHAT
    text = "Name a fruit.<eos>\n### Assistant: été"
    assert tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    model = load_policy(config, tokenizer)
    close(logits_of(model), logits_of(llama()))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    exact(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


def test_quantised_weights_become_floating_point(tmp_path):
    file = write_gguf(tmp_path / "q8.gguf", llama(), TOKENIZER, kind="Q8_0")
    for dtype, expected in (("float32", torch.float32), ("auto", torch.float32)):
        model = load_policy(ModelConfig(path=str(file), dtype=dtype), TOKENIZER)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        close(logits_of(model), logits_of(llama()), atol=0.5)
    model = load_policy(ModelConfig(path=str(file), dtype="bfloat16"), TOKENIZER)
    assert model.dtype == torch.bfloat16


def test_a_directory_may_hold_the_file(file, tmp_path):
    shutil.copy(file, tmp_path / "model.gguf")
    config = ModelConfig(path=str(tmp_path))
    close(logits_of(load_policy(config, load_tokenizer(config))), logits_of(llama()))


def test_a_hub_id_may_hold_the_file(file, hub_cache, tmp_path):
    (tmp_path / "model").mkdir()
    shutil.copy(file, tmp_path / "model/q8.gguf")
    name = as_hub_id(tmp_path / "model", hub_cache)
    for path in (name, f"{name}/q8.gguf"):
        config = ModelConfig(path=path)
        check_model(path, "model.path", ("sft",))
        try_settings(config, PeftConfig(), "CAUSAL_LM")
        close(logits_of(load_policy(config, load_tokenizer(config))), logits_of(llama()))
    with pytest.raises(InputError, match=rf"{name}/q4.gguf: there is no .*, {name} has q8.gguf"):
        check_model(f"{name}/q4.gguf", "model.path", ("sft",))
    shutil.copy(file, hub_cache / f"models--someone--model/snapshots/{'a' * 40}/q4.gguf")
    with pytest.raises(InputError, match=rf"2 GGUF .*; give one: model.path={name}/q4.gguf"):
        check_model(name, "model.path", ("sft",))
    close(logits_of(load_policy(config, TOKENIZER)), logits_of(llama()))


def test_the_file_of_a_hub_id_is_downloaded_when_it_is_loaded(file, tmp_path, monkeypatch):
    """A Hub that lists its files, and an empty cache."""
    downloaded, snapshot = [], tmp_path / "snapshot"
    snapshot.mkdir()

    def download(repository, name, revision):
        downloaded.append((repository, name, revision))
        return shutil.copy(file, snapshot / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(snapshot))
    files = ["README.md", "q8.gguf", "parts/q4.gguf"]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *a, **k: files)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    config = ModelConfig(path="some/listed", revision="v1")
    check_model(config.path, "model.path", ("sft",), "v1")
    assert downloaded == []
    close(logits_of(load_policy(config, load_tokenizer(config))), logits_of(llama()))
    assert set(downloaded) == {("some/listed", "q8.gguf", "v1")}


@pytest.mark.parametrize(
    "path", ["dir/x.gguf", "x.gguf", "./a/b/x.gguf", "here/b/x.gguf", "a/b/c/x.gguf"]
)
def test_a_path_of_a_file_that_is_missing_is_no_hub_id(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match="no such file"):
        check_model(path, "model.path", ("sft",))


def test_a_reward_model_begins_with_the_weights_of_the_file(file):
    model = init_reward_model(ModelConfig(path=str(file)), TOKENIZER, seed=1)
    ids = torch.tensor([SEQUENCES[0]])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        close(hidden, llama().model(ids).last_hidden_state)


# --- Stages and commands ------------------------------------------------------------------------


def test_the_stages_train_on_a_gguf_file_and_leave_safetensors(file, tmp_path):
    lora = PeftConfig(enabled=True, r=2)
    config = sft_config(tmp_path, "mine", 2, model=ModelConfig(path=str(file)), peft=lora)
    results = [train_sft(config).directory, train_ppo(make_config(file, tmp_path)).directory]
    for directory in results:
        record = read_record(directory)
        assert (record.parent, record.parent_weights) == (str(file), hash_weights(file))
        AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert not torch.equal(logits_of(model), logits_of(llama()))


def test_a_gguf_file_answers_prompts(file, tmp_path):
    (tmp_path / "prompts.txt").write_text("Name a fruit.\nName a tool.\n")
    out = tmp_path / "answers.jsonl"
    options = {"prompts": str(tmp_path / "prompts.txt"), "out": str(out), "response_length": 4}
    run_generate(GenerateOptions(path=str(file), **options))
    assert len(out.read_text().splitlines()) == 2


def test_a_gguf_file_is_exported_as_safetensors(file, tmp_path):
    export(ExportOptions(path=str(file), out=str(tmp_path / "plain")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    close(logits_of(model), logits_of(llama()))


# --- Refusals -----------------------------------------------------------------------------------


def no_gguf(file):
    file.write_bytes(b"PK\x03\x04" + bytes(100))


def cut_in_the_header(file):
    file.write_bytes(file.read_bytes()[:3000])


def cut_in_the_weights(file):
    file.write_bytes(file.read_bytes()[:-1])


def another_architecture(file):
    write_gguf(file, llama(), TOKENIZER, architecture="rwkv7")


def one_of_three(file):
    write_gguf(file, llama(), TOKENIZER, split_count=3)


def a_later_version(file):
    content = file.read_bytes()
    file.write_bytes(content[:4] + b"\x09" + content[5:])


@pytest.mark.parametrize(
    "change, says",
    [
        (no_gguf, "model.path=x.gguf is not a GGUF file: it begins with b'PK\\x03\\x04', not with"),
        (cut_in_the_header, "model.path=x.gguf is damaged or incomplete (its header"),
        (cut_in_the_weights, "model.path=x.gguf is incomplete: it has "),
        (another_architecture, "does not read GGUF files of the architecture rwkv7, only bloom, "),
        (one_of_three, "model.path=x.gguf is one of 3 parts of a model; join them first: "),
        (a_later_version, "(its header"),
        (lambda file: file.unlink(), "model.path=x.gguf: no such file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_that_cannot_be_read_is_refused_early(change, says, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "x.gguf"
    shutil.copy(file, copy)
    change(copy)
    with pytest.raises(InputError) as refused:
        check_model("x.gguf", "model.path", ("sft",))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_directory_with_several_files_names_one(file, tmp_path):
    for name in ("q4.gguf", "q8.gguf"):
        shutil.copy(file, tmp_path / name)
    with pytest.raises(InputError, match=r"2 GGUF files \(q4.gguf, q8.gguf\); give one: .*q4.gguf"):
        check_model(str(tmp_path), "model.path", ("sft",))


def test_a_missing_package_is_named_with_its_command(file, monkeypatch):
    monkeypatch.setattr(rlhf.gguf_files, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the gguf package: pip install 'rlhf\[gguf\]'"):
        check_model(str(file), "model.path", ("sft",))


def test_bitsandbytes_on_a_gguf_file_is_refused_with_a_way_out(file):
    config = ModelConfig(path=str(file), quantization="4bit")
    with pytest.raises(InputError, match="write safetensors first: python -m rlhf.export path="):
        load_policy(config, TOKENIZER)
