"""Stage directories and training state: written whole or not at all, refused where they do not fit.

Leaves out what the stages put in. Run: python -m pytest tests/test_checkpoint.py
"""

import dataclasses
import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_tokenizer

from rlhf.checkpoint import (
    GracefulStop,
    StageRecord,
    check_same_tokenizer,
    complete_or_nothing,
    hash_tokenizer,
    hash_weights,
    latest_checkpoint,
    load_training_state,
    make_record,
    prepare_run_directory,
    read_record,
    require_stage,
    save_training_state,
    write_stage,
)
from rlhf.config import InputError, SFTStageConfig, load_config


class Model:
    """Saves one weight, as a transformers model does; `fails` after half of the work."""

    def __init__(self, weight=1.0, fails=False):
        self.weight, self.fails = weight, fails

    def save_pretrained(self, directory):
        save_file({"weight": torch.tensor([self.weight])}, directory / "model.safetensors")
        if self.fails:
            raise OSError("disk full")
        (directory / "config.json").write_text("{}")


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def write(directory, tokenizer, stage="sft", **model):
    record = make_record(stage, SFTStageConfig(seed=5), None, tokenizer)
    write_stage(directory, Model(**model), tokenizer, SFTStageConfig(seed=5), record)
    return record


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
    check_same_tokenizer(loaded, record, "model.path=a", "scorer.path=b")
    check_same_tokenizer(loaded, None, "model.path=a", "scorer.path=b")


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
        check_same_tokenizer(other, record, "model.path=a", "scorer.path=b")
    assert "scorer.path=b" in str(caught.value) and "model.path=a" in str(caught.value)


def test_hash_of_weights_changes_with_one_weight(tmp_path, tokenizer):
    hashes = []
    for number, weight in enumerate((1.0, 1.0, 1.0 + 1e-6)):
        write(tmp_path / str(number), tokenizer, weight=weight)
        hashes.append(hash_weights(tmp_path / str(number)))
    assert hashes[0] == hashes[1] != hashes[2]
    child = make_record("reward", SFTStageConfig(), str(tmp_path / "0"), tokenizer)
    assert child.parent_weights == hashes[0]


# --- Run directory --------------------------------------------------------------------------------


def config_of(tmp_path, **changes):
    return SFTStageConfig(runs_dir=str(tmp_path), run_name="mine", **changes)


def test_new_run_directory_is_made(tmp_path):
    assert prepare_run_directory(config_of(tmp_path), "sft") == tmp_path / "mine" / "sft"
    assert (tmp_path / "mine" / "sft").is_dir()
    prepare_run_directory(config_of(tmp_path), "sft")  # still empty


@pytest.mark.parametrize("inside, what", [("checkpoint-1", "an unfinished"), ("final", "a fini")])
def test_used_run_directory_is_refused_and_overwrite_empties_it(inside, what, tmp_path):
    (tmp_path / "mine" / "sft" / inside).mkdir(parents=True)
    (tmp_path / "mine" / "reward").mkdir()
    with pytest.raises(InputError, match=f"already holds {what}.*resume=true.*overwrite=true"):
        prepare_run_directory(config_of(tmp_path), "sft")
    assert (tmp_path / "mine" / "sft" / inside).is_dir()
    directory = prepare_run_directory(config_of(tmp_path, overwrite=True), "sft")
    assert list(directory.iterdir()) == []
    assert (tmp_path / "mine" / "reward").is_dir()


def test_resume_keeps_an_unfinished_run_and_refuses_a_finished_one(tmp_path):
    checkpoint = tmp_path / "mine" / "sft" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    prepare_run_directory(config_of(tmp_path, resume=True), "sft")
    assert checkpoint.is_dir()
    (tmp_path / "mine" / "sft" / "final").mkdir()
    with pytest.raises(InputError, match="is finished: there is nothing to resume; use another"):
        prepare_run_directory(config_of(tmp_path, resume=True), "sft")


def test_resume_with_overwrite_is_refused_and_deletes_nothing(tmp_path):
    (tmp_path / "mine" / "sft" / "final").mkdir(parents=True)
    with pytest.raises(InputError, match="contradict each other"):
        prepare_run_directory(config_of(tmp_path, resume=True, overwrite=True), "sft")
    assert (tmp_path / "mine" / "sft" / "final").is_dir()


def test_latest_checkpoint_counts_numerically_and_ignores_incomplete_ones(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.tmp", "final", "checkpoint-best"):
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


# --- Training state -------------------------------------------------------------------------------


def small_network(seed, hidden=5):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Linear(3, hidden), torch.nn.Linear(hidden, hidden), torch.nn.Linear(hidden, 1)
    )
    network[1].requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1
    )
    return network, optimizer


def train(network, optimizer, steps):
    for step in steps:
        batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(batch).square().mean().backward()
        optimizer.step()


def test_resumed_training_is_bit_identical_to_uninterrupted(tmp_path):
    network, optimizer = small_network(seed=0)
    train(network, optimizer, range(6))
    frozen = network[1].weight.clone()
    save_training_state(
        tmp_path / "checkpoint-6", {"policy": network}, {"policy": optimizer}, {"update": 6}
    )
    train(network, optimizer, range(6, 12))

    resumed, fresh = small_network(seed=1)
    resumed[1].load_state_dict(network[1].state_dict())
    state = load_training_state(tmp_path / "checkpoint-6", {"policy": resumed}, {"policy": fresh})
    assert state == {"update": 6}
    train(resumed, fresh, range(6, 12))
    for (name, expected), actual in zip(
        network.named_parameters(), resumed.parameters(), strict=True
    ):
        assert torch.equal(expected, actual), name
    assert torch.equal(resumed[1].weight, frozen)
    for expected, actual in zip(
        optimizer.state_dict()["state"].values(), fresh.state_dict()["state"].values(), strict=True
    ):
        assert {k: v.tolist() for k, v in expected.items()} == {
            k: v.tolist() for k, v in actual.items()
        }


def test_frozen_parameters_are_neither_written_nor_overwritten(tmp_path):
    from safetensors.torch import load_file

    network, optimizer = small_network(seed=0)
    save_training_state(tmp_path / "c", {"policy": network}, {"policy": optimizer}, {})
    saved = load_file(tmp_path / "c" / "policy.safetensors")
    assert sorted(saved) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    other, fresh = small_network(seed=1)
    before = other[1].weight.clone()
    load_training_state(tmp_path / "c", {"policy": other}, {"policy": fresh})
    assert torch.equal(other[1].weight, before)
    assert torch.equal(other[0].weight, network[0].weight)


def test_state_of_another_model_is_refused(tmp_path):
    network, optimizer = small_network(seed=0)
    save_training_state(tmp_path / "c", {"policy": network}, {"policy": optimizer}, {})
    larger, fresh = small_network(seed=0, hidden=6)
    with pytest.raises(InputError, match="the policy weights there belong to another model"):
        load_training_state(tmp_path / "c", {"policy": larger}, {"policy": fresh})
    unfrozen, fresh = small_network(seed=0)
    unfrozen.requires_grad_(True)
    with pytest.raises(InputError, match="the policy weights there belong to another model"):
        load_training_state(tmp_path / "c", {"policy": unfrozen}, {"policy": fresh})


# --- Ctrl-C ---------------------------------------------------------------------------------------


def test_first_interrupt_asks_to_stop_and_the_second_stops(capsys):
    before = signal.getsignal(signal.SIGINT)
    with GracefulStop() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested()
        assert "saving a checkpoint" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_handler_is_restored_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), GracefulStop():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before
