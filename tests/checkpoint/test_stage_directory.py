"""Stage directories: written completely or not at all, refused where they do not fit.

Run: python -m pytest tests/checkpoint/test_stage_directory.py
"""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import write
from helpers.tiny import tiny_tokenizer

from rlhf.checkpoint import (
    StageRecord,
    complete_or_nothing,
    hash_weights,
    make_record,
    read_record,
    require_same_tokenizer,
    require_stage,
)
from rlhf.config import InputError, SFTStageConfig, load_config
from rlhf.tokenizer import hash_tokenizer

# --- Stage directory ------------------------------------------------------------------------------


def test_stage_directory_holds_record_and_configuration(tmp_path, tokenizer):
    record = write(tmp_path / "final", tokenizer)
    assert read_record(tmp_path / "final") == record
    assert load_config(SFTStageConfig, tmp_path / "final" / "config.yaml") == SFTStageConfig(seed=5)
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert (record.stage, record.seed, record.parent_weights) == ("sft", 5, None)
    assert (record.eos_token_id, record.pad_token_id) == (2, 0)
    assert record.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_record_keeps_every_field(tmp_path):
    record = StageRecord(
        *("reward", "runs/a/sft/final", "abc", "main", "def", "ghi", 2, 0, 5, 0.25, 1.5),
        metrics={"accuracy": 0.75},
        versions={"torch": "2"},
    )
    (tmp_path / "rlhf.json").write_text(json.dumps(dataclasses.asdict(record)))
    assert read_record(tmp_path) == record


def test_failure_while_writing_leaves_no_stage_directory(tmp_path, tokenizer):
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "final", tokenizer, fails=True)
    assert not (tmp_path / "final").exists()


def test_failure_while_writing_keeps_the_old_stage_directory(tmp_path, tokenizer):
    write(tmp_path / "final", tokenizer, weight=1.0)
    before = {p.name: p.read_bytes() for p in (tmp_path / "final").iterdir()}
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "final", tokenizer, weight=2.0, fails=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "final").iterdir()} == before


def test_leftover_of_a_failure_does_not_enter_the_next_directory(tmp_path):
    with pytest.raises(RuntimeError), complete_or_nothing(tmp_path / "x") as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    with complete_or_nothing(tmp_path / "x") as temporary:
        (temporary / "whole").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["x", "whole"]


def test_directory_that_no_stage_wrote_has_no_record(tmp_path):
    assert read_record(tmp_path) is None
    assert read_record("EleutherAI/pythia-70m") is None


@pytest.mark.parametrize("text", ['{"stage": "sft"', '{"stage": "sft"}', '{"stag": 1}', "[1]"])
def test_damaged_record_is_named(text, tmp_path):
    (tmp_path / "rlhf.json").write_text(text)
    with pytest.raises(InputError, match=r"rlhf\.json is damaged .*; run the stage again"):
        read_record(tmp_path)


def test_wrong_stage_is_named_with_the_right_one(tmp_path, tokenizer):
    write(tmp_path / "final", tokenizer, stage="sft")
    with pytest.raises(InputError) as caught:
        require_stage(tmp_path / "final", ("reward",), "scorer.path")
    for part in ("scorer.path=", "was written by the sft stage", "runs/<run_name>/reward/final"):
        assert part in str(caught.value)
    assert require_stage(tmp_path / "final", ("reward", "sft"), "model.path").stage == "sft"


@pytest.mark.parametrize("given", ["", "sft"])
def test_run_folder_in_place_of_final_names_the_final_directories(given, tmp_path, tokenizer):
    for stage in ("sft", "reward"):
        write(tmp_path / stage / "final", tokenizer, stage=stage)
    with pytest.raises(InputError, match="no config.json") as caught:
        require_stage(tmp_path / given, ("sft",), "model.path")
    assert f"did you mean {tmp_path / 'sft' / 'final'}?" in str(caught.value)


def test_ordinary_model_directory_and_hub_id_pass(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert require_stage(tmp_path, ("reward",), "scorer.path") is None
    assert require_stage("EleutherAI/pythia-70m", ("sft",), "model.path") is None


# --- Hashes ---------------------------------------------------------------------------------------


def test_hash_of_a_tokenizer_survives_saving(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert hash_tokenizer(loaded) == hash_tokenizer(tokenizer) == hash_tokenizer(tiny_tokenizer())
    record = make_record("sft", SFTStageConfig(), None, tokenizer)
    require_same_tokenizer(loaded, record, "model.path=a", "scorer.path=b")
    require_same_tokenizer(loaded, None, "model.path=a", "scorer.path=b")


def add_token(tokenizer):
    tokenizer.add_tokens(["<new>"])


def change_eos(tokenizer):
    tokenizer.eos_token = "<bos>"


def change_template(tokenizer):
    tokenizer.chat_template = "{{ messages[0] }}"


@pytest.mark.parametrize(
    "change, message",
    [
        (add_token, "have different vocabularies; train both from the same SFT directory"),
        (change_eos, "have different vocabularies; train both from the same SFT directory"),
        (change_template, "render prompts differently; train both from the same SFT directory"),
    ],
)
def test_mismatch_of_tokenizers_names_both_sides(change, message, tokenizer):
    record = make_record("reward", SFTStageConfig(), None, tokenizer)
    other = tiny_tokenizer()
    other.chat_template = tokenizer.chat_template
    change(other)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        require_same_tokenizer(other, record, "model.path=a", "scorer.path=b")
    assert "scorer.path=b" in str(caught.value) and "model.path=a" in str(caught.value)


def test_hash_of_weights_changes_with_one_weight(tmp_path, tokenizer):
    hashes = []
    for number, weight in enumerate((1.0, 1.0, 1.0 + 1e-6)):
        write(tmp_path / str(number), tokenizer, weight=weight)
        hashes.append(hash_weights(tmp_path / str(number)))
    assert hashes[0] == hashes[1] != hashes[2]
    child = make_record("reward", SFTStageConfig(), str(tmp_path / "0"), tokenizer)
    assert child.parent_weights == hashes[0]


def test_hash_of_weights_is_of_all_shards(tmp_path):
    for name in ("model-00001-of-00002", "model-00002-of-00002"):
        (tmp_path / f"{name}.safetensors").write_text("a")
    before = hash_weights(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_text("b")
    assert hash_weights(tmp_path) != before


def test_weights_that_change_within_a_tick_of_the_clock_are_read_again(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_text("a")
    first, stat = file.stat(), Path.stat
    monkeypatch.setattr(
        Path, "stat", lambda path, **how: first if path == file else stat(path, **how)
    )
    before = hash_weights(tmp_path)
    file.write_text("b")
    assert hash_weights(tmp_path) != before
