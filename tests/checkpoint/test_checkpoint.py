"""Stage directories and checkpoints: written whole or not at all, refused where they do not fit;
damage is found; signals.

Leaves out what the stages put in, and runs that are killed (test_resume.py).

Run: python -m pytest tests/checkpoint/test_checkpoint.py
"""

import dataclasses
import json
import os
import random
import re
import signal
import time

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_tokenizer
from safetensors.torch import save_file
from transformers import PretrainedConfig

from rlhf.checkpoint import (
    GracefulStop,
    StageRecord,
    check_same_tokenizer,
    checkpoint_to_resume,
    complete_or_nothing,
    find_damage,
    hash_weights,
    load_modules,
    load_training_state,
    make_record,
    prune_checkpoints,
    read_manifest,
    read_record,
    require_stage,
    save_training_state,
    write_stage,
)
from rlhf.checkpoint.atomic import write_manifest
from rlhf.checkpoint.ownership import complete_checkpoints, latest_checkpoint, seal
from rlhf.checkpoint.run_directory import finished_run, prepare_run_directory
from rlhf.config import (
    CheckpointConfig,
    InputError,
    SFTStageConfig,
    TrackerConfig,
    load_config,
    save_config,
)
from rlhf.tokenizer import hash_tokenizer


class Model:
    """Saves one weight, as a transformers model does; `fails` after half of the work."""

    dtype, config = torch.float32, PretrainedConfig()

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


def write(directory, tokenizer, stage="sft", config=None, **model):
    config = config or SFTStageConfig(seed=5)
    record = make_record(stage, config, None, tokenizer)
    write_stage(directory, Model(**model), tokenizer, config, record)
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


def test_run_keeps_the_identity_that_it_got_first(tmp_path):
    directory = prepare_run_directory(config_of(tmp_path), "sft")
    first = json.loads((directory / "run.json").read_text())
    assert first["stage"] == "sft" and len(first["id"]) == 16
    prepare_run_directory(config_of(tmp_path, resume="auto"), "sft")
    assert json.loads((directory / "run.json").read_text()) == first
    (directory / "metrics.jsonl").touch()
    prepare_run_directory(config_of(tmp_path, overwrite=True), "sft")
    assert json.loads((directory / "run.json").read_text())["id"] != first["id"]


@pytest.mark.parametrize("inside, what", [("checkpoint-1", "an unfinished"), ("final", "a fini")])
def test_used_run_directory_is_refused_and_overwrite_empties_it(inside, what, tmp_path):
    (tmp_path / "mine" / "sft" / inside).mkdir(parents=True)
    (tmp_path / "mine" / "reward").mkdir()
    with pytest.raises(InputError, match=f"already holds {what}.*resume=true.*overwrite=true"):
        prepare_run_directory(config_of(tmp_path), "sft")
    assert (tmp_path / "mine" / "sft" / inside).is_dir()
    directory = prepare_run_directory(config_of(tmp_path, overwrite=True), "sft")
    assert names(directory) == ["config.yaml", "run.json"]
    assert (tmp_path / "mine" / "reward").is_dir()


@pytest.mark.parametrize("resume", [True, "auto"])
def test_resume_keeps_an_unfinished_run_and_refuses_a_finished_one(resume, tmp_path):
    config = config_of(tmp_path, resume=resume)
    checkpoint = make_checkpoint(prepare_run_directory(config_of(tmp_path), "sft"), 1, config)
    prepare_run_directory(config, "sft")
    assert checkpoint.is_dir()
    (tmp_path / "mine" / "sft" / "final").mkdir()
    with pytest.raises(InputError, match="is finished: there is nothing to resume; use another"):
        prepare_run_directory(config, "sft")


@pytest.mark.parametrize("resume", [True, "auto"])
def test_resume_with_overwrite_is_refused_and_deletes_nothing(resume, tmp_path):
    (tmp_path / "mine" / "sft" / "final").mkdir(parents=True)
    with pytest.raises(InputError, match=f"resume={resume}.* contradict".lower()):
        prepare_run_directory(config_of(tmp_path, resume=resume, overwrite=True), "sft")
    assert (tmp_path / "mine" / "sft" / "final").is_dir()


@pytest.mark.parametrize("resume", [True, "auto"])
def test_finished_run_is_found_when_resuming_and_not_under_another_configuration(
    resume, tmp_path, tokenizer, capsys
):
    config = config_of(tmp_path, seed=5, resume=resume)
    assert finished_run(config, "sft") is None
    record = write(tmp_path / "mine" / "sft" / "final", tokenizer, config=config)
    assert finished_run(config, "sft") == record
    assert "sft is finished: nothing to do" in capsys.readouterr().out
    assert finished_run(dataclasses.replace(config, resume=False), "sft") is None
    with pytest.raises(InputError, match="with a different configuration:\n  seed: 5 -> 6\n"):
        finished_run(dataclasses.replace(config, seed=6), "sft")


# --- Checkpoints ----------------------------------------------------------------------------------


def make_checkpoint(directory, step, config=None, best=None, weight=1.0):
    """A sealed checkpoint with one weight."""
    checkpoint = directory / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.tensor([weight])}, checkpoint / "policy.safetensors")
    save_config(config or SFTStageConfig(), checkpoint / "config.yaml")
    seal(checkpoint, directory, best)
    return checkpoint


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_latest_checkpoint_counts_numerically_and_ignores_incomplete_ones(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (9, 10):
        make_checkpoint(tmp_path, step)
    for name in ("checkpoint-11", "checkpoint-12.tmp", "final", "checkpoint-best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11" / "manifest.json").write_text("{")
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-9", tmp_path / "checkpoint-10"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_manifest_holds_size_and_hash_of_every_file(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    write_manifest(tmp_path, {"fact": 1})
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert read_manifest(tmp_path) == {
        "fact": 1,
        "files": {"b": {"size": 0, "sha256": nothing}, "inner/a": {"size": 3, "sha256": sha256}},
    }
    assert find_damage(tmp_path) is None


def test_one_flipped_bit_anywhere_in_a_checkpoint_is_found(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 1)
    for name in names(checkpoint):
        file = checkpoint / name
        content = file.read_bytes()
        step = max(1, len(content) // 50)
        for position in range(0, len(content), step):
            damaged = bytearray(content)
            damaged[position] ^= 1
            file.write_bytes(damaged)
            assert name in (find_damage(checkpoint) or ""), (name, position)
        file.write_bytes(content)
    assert find_damage(checkpoint) is None


def test_missing_and_truncated_files_are_named(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 1)
    file = checkpoint / "policy.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 3)
    assert find_damage(checkpoint) == f"policy.safetensors has {size - 3} bytes instead of {size}"
    assert find_damage(checkpoint, ["config.yaml"]) is None
    file.unlink()
    assert find_damage(checkpoint) == "policy.safetensors is missing"
    (checkpoint / "manifest.json").unlink()
    assert find_damage(checkpoint) == "manifest.json is missing: its writing was cut off"


@pytest.mark.parametrize(
    "keep_last, kept", [(1, [2, 6]), (2, [2, 4, 6]), (3, [2, 3, 4, 6]), (9, [1, 2, 3, 4, 6])]
)
def test_newest_checkpoints_and_their_best_are_kept(keep_last, kept, tmp_path):
    for step, best in {1: 1, 2: 2, 3: 2, 4: 2, 6: 2}.items():
        make_checkpoint(tmp_path, step, best=best)
    (tmp_path / "checkpoint-best").mkdir()
    prune_checkpoints(tmp_path, keep_last)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept] + ["checkpoint-best"]


def test_what_was_left_of_a_checkpoint_goes_once_a_newer_one_is_there(tmp_path):
    (tmp_path / "run.json").write_text('{"id": "0123", "stage": "sft"}')
    for step in (3, 4, 8, 9):
        (make_checkpoint(tmp_path, step) / "manifest.json").unlink()
    for step in (4, 8):
        (tmp_path / f"checkpoint-{step}").rename(tmp_path / f"checkpoint-{step}.damaged")
    before = names(tmp_path)
    prune_checkpoints(tmp_path, 2)
    assert names(tmp_path) == before
    make_checkpoint(tmp_path, 4)
    prune_checkpoints(tmp_path, 2)
    left = [f"checkpoint-{name}" for name in ("4", "8.damaged", "9")]
    assert names(tmp_path) == [*left, "run.json"]


def test_checkpoint_whose_best_one_is_damaged_is_not_used(tmp_path, capsys):
    config = config_of(tmp_path, resume=True)
    directory = prepare_run_directory(config_of(tmp_path), "sft")
    for step, best in {1: None, 2: 2, 3: 2}.items():
        make_checkpoint(directory, step, config, best)
    os.truncate(directory / "checkpoint-2" / "policy.safetensors", 5)
    assert checkpoint_to_resume(config, directory) == directory / "checkpoint-1"
    warnings = capsys.readouterr().err
    assert (
        "checkpoint-3 is damaged: its best checkpoint, checkpoint-2, is damaged: policy" in warnings
    )
    assert "checkpoint-2 is damaged: policy.safetensors has 5 bytes" in warnings
    assert names(directory) == [
        *("checkpoint-1", "checkpoint-2.damaged", "checkpoint-3.damaged"),
        *("config.yaml", "run.json"),
    ]


def test_resume_true_does_not_start_afresh_where_no_checkpoint_is_intact(tmp_path):
    config = config_of(tmp_path, resume=True)
    directory = prepare_run_directory(config_of(tmp_path), "sft")
    os.truncate(make_checkpoint(directory, 3, config) / "policy.safetensors", 5)
    before = names(directory)
    with pytest.raises(
        InputError, match="(?s)no checkpoint is intact.*checkpoint-3: policy.* 5 bytes"
    ):
        checkpoint_to_resume(config, directory)
    assert names(directory) == before


def test_logs_are_cut_back_to_what_they_were_at_the_checkpoint(tmp_path):
    config = config_of(tmp_path, resume=True)
    directory = prepare_run_directory(config_of(tmp_path), "sft")
    (directory / "metrics.jsonl").write_text('{"step": 1}\n')
    make_checkpoint(directory, 1, config)
    (directory / "metrics.jsonl").write_text('{"step": 1}\n{"step": 1, "eval": 2}\n{"st')
    (directory / "samples.jsonl").write_text('{"step": 2}\n')
    checkpoint_to_resume(dataclasses.replace(config, resume=False), directory)
    assert (directory / "samples.jsonl").read_text() == '{"step": 2}\n'
    checkpoint_to_resume(config, directory)
    assert (directory / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (directory / "samples.jsonl").read_text() == ""


def test_differences_of_the_configuration_are_listed_and_only_harmless_ones_pass(tmp_path, capsys):
    config = config_of(tmp_path, resume=True)
    directory = prepare_run_directory(config_of(tmp_path), "sft")
    config.model.path = str(directory / "final")
    checkpoint = make_checkpoint(directory, 1, config)
    moved = config_of(
        tmp_path / "elsewhere" / "..",
        resume="auto",
        checkpoint=CheckpointConfig(keep_last=7, grace_seconds=1),
        tracker=TrackerConfig(name="wandb"),
    )
    moved.model.path = str(moved.stage_dir("sft") / "final")  # the same place in the moved run
    assert checkpoint_to_resume(moved, directory) == checkpoint
    said = capsys.readouterr().out
    for line in ("checkpoint.keep_last: 2 -> 7", 'tracker.name: "none" -> "wandb"', "runs_dir"):
        assert f"changed, without effect on what is trained: {line}" in said
    assert "model.path" not in said and "resume:" not in said
    moved.precision, moved.trainer = "float32", moved.trainer | {"learning_rate": 1.0}
    with pytest.raises(InputError) as caught:
        checkpoint_to_resume(moved, directory)
    assert '\n  precision: "auto" -> "float32"\n  trainer.learning_rate: 2e-05 -> 1.0\n' in str(
        caught.value
    )


def test_another_number_of_processes_is_refused(tmp_path, monkeypatch):
    config = config_of(tmp_path, resume=True)
    directory = prepare_run_directory(config_of(tmp_path), "sft")
    make_checkpoint(directory, 1, config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="\n  number of processes: 1 -> 2\n"):
        prepare_run_directory(config, "sft")


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
        *(tmp_path / "checkpoint-6", {"policy": network}, {"policy": optimizer}),
        *({"update": 6}, SFTStageConfig()),
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
    save_training_state(
        tmp_path / "c", {"policy": network}, {"policy": optimizer}, {}, SFTStageConfig()
    )
    saved = load_file(tmp_path / "c" / "policy.safetensors")
    assert sorted(saved) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    other, fresh = small_network(seed=1)
    before = other[1].weight.clone()
    load_training_state(tmp_path / "c", {"policy": other}, {"policy": fresh})
    assert torch.equal(other[1].weight, before)
    assert torch.equal(other[0].weight, network[0].weight)


def test_state_of_another_model_is_refused(tmp_path):
    network, optimizer = small_network(seed=0)
    save_training_state(
        tmp_path / "c", {"policy": network}, {"policy": optimizer}, {}, SFTStageConfig()
    )
    larger, fresh = small_network(seed=0, hidden=6)
    with pytest.raises(InputError, match="the policy weights there belong to another model"):
        load_training_state(tmp_path / "c", {"policy": larger}, {"policy": fresh})
    unfrozen, fresh = small_network(seed=0)
    unfrozen.requires_grad_(True)
    with pytest.raises(InputError, match="the policy weights there belong to another model"):
        load_training_state(tmp_path / "c", {"policy": unfrozen}, {"policy": fresh})


def test_dict_of_tensors_is_saved_and_loaded_in_place(tmp_path):
    averages = {"a.weight": torch.randn(2, 3), "b": torch.randn(4)}
    expected = {name: tensor.clone() for name, tensor in averages.items()}
    save_training_state(tmp_path / "c", {"averages": averages}, {}, {}, SFTStageConfig())
    for tensor in averages.values():
        tensor.zero_()
    load_modules(tmp_path / "c", {"averages": averages})
    assert all(torch.equal(averages[name], expected[name]) for name in expected)


def test_modules_are_loaded_alone_and_by_name(tmp_path):
    network, optimizer = small_network(seed=0)
    critic, _ = small_network(seed=1)
    modules = {"policy": network, "critic": critic}
    save_training_state(tmp_path / "c", modules, {"policy": optimizer}, {}, SFTStageConfig())
    fresh, _ = small_network(seed=2)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_modules(tmp_path / "c", {"critic": fresh})
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(fresh[0].weight, critic[0].weight)


def test_global_random_numbers_continue_where_they_were(tmp_path):
    def draw():
        normal = (random.gauss(0, 1), float(np.random.standard_normal()))
        return [random.random(), np.random.rand(), float(torch.rand(())), *normal]

    draw()  # an odd number of normal ones: one more is in store
    save_training_state(tmp_path / "c", {}, {}, {}, SFTStageConfig())
    expected = [draw() for _ in range(3)]
    load_training_state(tmp_path / "c", {}, {})
    assert [draw() for _ in range(3)] == expected


def test_state_names_the_best_checkpoint_that_is_kept(tmp_path):
    for step, state in {1: {"best": {"update": 1}}, 2: {"best": {"update": 1}}, 3: {}}.items():
        save_training_state(tmp_path / f"checkpoint-{step}", {}, {}, state, SFTStageConfig())
        prune_checkpoints(tmp_path, 1)
        assert (
            names(tmp_path)
            == {
                1: ["checkpoint-1"],
                2: ["checkpoint-1", "checkpoint-2"],
                3: ["checkpoint-3"],
            }[step]
        )


def test_training_state_holds_nothing_pickled(tmp_path):
    network, optimizer = small_network(seed=0)
    train(network, optimizer, range(2))
    save_training_state(
        *(tmp_path / "c", {"policy": network}, {"policy": optimizer}, {}, SFTStageConfig())
    )
    suffixes = {path.suffix for path in (tmp_path / "c").iterdir()}
    assert suffixes == {".safetensors", ".json", ".yaml"}


# --- Signals --------------------------------------------------------------------------------------

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


@pytest.mark.parametrize("number, name", [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_first_signal_asks_to_stop_and_ctrl_c_then_stops(number, name, tmp_path, capfd):
    before = [signal.getsignal(s) for s in SIGNALS]
    with GracefulStop(60, tmp_path) as stop:
        assert not stop.requested() and stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.requested() and stop.signal == number
        text = f"\n{name}: finishing this step, then saving a checkpoint, for at most 60 seconds"
        assert text in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)  # some send it again and again
        assert stop.signal == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_block_that_outlasts_the_grace_time_is_left(number, status, tmp_path, capfd):
    make_checkpoint(tmp_path, 7)
    with pytest.raises(SystemExit) as stop, GracefulStop(0.05, tmp_path):
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert stop.value.code == status
    said = f"exiting without saving; {tmp_path / 'checkpoint-7'} remains"
    assert said in capfd.readouterr().err
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_save_that_outlasts_the_grace_time_leaves_no_checkpoint(tmp_path, capfd):
    with pytest.raises(SystemExit), GracefulStop(0.05, tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
        with complete_or_nothing(tmp_path / "checkpoint-1"):
            time.sleep(10)
    assert "there is no checkpoint" in capfd.readouterr().err
    assert complete_checkpoints(tmp_path) == []


def test_handlers_are_restored_after_an_error(tmp_path):
    before = [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(RuntimeError), GracefulStop(60, tmp_path):
        raise RuntimeError
    assert [signal.getsignal(s) for s in SIGNALS] == before
