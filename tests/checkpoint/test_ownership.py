"""Nothing in a run's directory that the run did not make is loaded, renamed, cut or deleted.

Leaves out two runs in one directory (test_lock.py).

Run: python -m pytest tests/checkpoint/test_ownership.py
"""

import os
import re
import shutil

import pytest
from helpers.checkpoints import config_of, make_checkpoint, names, snapshot, write

from rlhf.checkpoint import (
    checkpoint_to_resume,
    complete_or_nothing,
    prune_checkpoints,
    refuse_taken_steps,
)
from rlhf.checkpoint.ownership import (
    clear,
    complete_checkpoints,
    latest_checkpoint,
    own_checkpoints,
)
from rlhf.checkpoint.run_directory import prepare_run_directory, refuse_used_directory
from rlhf.checkpoint.state import save_training_state
from rlhf.config import InputError


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 4 and 8, and what a user put next to them."""
    config = config_of(tmp_path, resume="auto")
    directory = prepare_run_directory(config, "sft")
    (directory / "metrics.jsonl").write_text('{"step": 1}\n')
    for step in (4, 8):
        make_checkpoint(directory, step, config)
    (directory / "notes.jsonl").write_text("mine\n")
    for name in ("checkpoint-41-20261128", "checkpoint-08", "checkpoint-٩", "checkpoint-8 copy"):
        shutil.copytree(directory / "checkpoint-8", directory / name)
    for name in (
        *("checkpoint-backup-3", "checkpoint-3", "checkpoint-9", "checkpoint-4.tmp"),
        *("checkpoint-4.old", "checkpoint-4.damaged", "final.old", "final.tmp"),
    ):
        (directory / name).mkdir()
        (directory / name / "notes.txt").write_text("mine")
    for name in ("checkpoint-7", "checkpoint-x-7", "checkpoint-2.damaged"):
        (directory / name).write_text("mine")
    (directory / "checkpoint-6").symlink_to("checkpoint-4")
    (directory / "checkpoint-10").symlink_to("nowhere")
    mine = [path for path in directory.iterdir() if path.name not in OWN]
    return config, directory, mine


OWN = ("checkpoint-4", "checkpoint-8", "config.yaml", "metrics.jsonl", "run.json")


def test_only_directories_that_the_run_made_are_its_checkpoints(run, capsys):
    config, directory, mine = run
    before = snapshot(mine)
    ours = [directory / "checkpoint-4", directory / "checkpoint-8"]
    assert own_checkpoints(directory) == complete_checkpoints(directory) == ours
    assert checkpoint_to_resume(config, directory) == ours[-1]
    (directory / "notes.jsonl").write_text("mine, and longer\n")
    assert checkpoint_to_resume(config, directory) == ours[-1]
    assert (directory / "notes.jsonl").read_text() == "mine, and longer\n"
    (directory / "notes.jsonl").write_text("mine\n")
    with complete_or_nothing(directory / "final") as temporary:
        (temporary / "config.json").touch()
    prepare_run_directory(config_of(directory.parents[1], resume="auto"), "reward")
    make_checkpoint(directory, 12, config)
    prune_checkpoints(directory, 1)
    assert own_checkpoints(directory) == [directory / "checkpoint-12"]
    assert snapshot(mine) == before
    warnings = capsys.readouterr().err
    for name in ("checkpoint-9", "checkpoint-10"):
        line = (
            f"warning: {directory / name} is not a checkpoint of this run: it is left unchanged\n"
        )
        assert line in warnings
    assert "checkpoint-3" not in warnings


def test_checkpoint_of_another_run_is_neither_chosen_nor_deleted(run, tmp_path):
    config, directory, _ = run
    other = prepare_run_directory(config_of(tmp_path / "b"), "sft")
    shutil.copytree(make_checkpoint(other, 5, config), directory / "checkpoint-5")
    assert latest_checkpoint(directory) == checkpoint_to_resume(config, directory)
    make_checkpoint(directory, 12, config)
    prune_checkpoints(directory, 1)
    assert (directory / "checkpoint-5/policy.safetensors").is_file()
    shutil.copytree(directory / "checkpoint-5", directory / "checkpoint-20")
    with pytest.raises(InputError, match="checkpoint-20 belongs to another run .*move it back"):
        checkpoint_to_resume(config, directory)


def test_own_checkpoint_without_a_manifest_is_set_aside_and_foreign_files_in_it_stay(run):
    config, directory, _ = run
    (directory / "checkpoint-8/manifest.json").unlink()
    (directory / "checkpoint-8/thoughts.txt").write_text("mine")
    assert checkpoint_to_resume(config, directory) == directory / "checkpoint-4"
    make_checkpoint(directory, 12, config)
    prune_checkpoints(directory, 1)
    assert (directory / "checkpoint-8.damaged/thoughts.txt").read_text() == "mine"
    assert not (directory / "checkpoint-4").exists()


def test_damaged_checkpoint_is_not_renamed_onto_something_of_the_user(run):
    config, directory, mine = run
    (directory / "checkpoint-8/manifest.json").unlink()
    (directory / "checkpoint-8.damaged").mkdir()
    with pytest.raises(InputError, match="checkpoint-8 is damaged, and .*8.damaged is in the way"):
        checkpoint_to_resume(config, directory)


def test_checkpoint_with_files_of_the_user_is_kept(run):
    config, directory, _ = run
    (directory / "checkpoint-4/notes.txt").write_text("mine")
    make_checkpoint(directory, 12, config)
    prune_checkpoints(directory, 1)
    assert complete_checkpoints(directory) == [
        directory / "checkpoint-4",
        directory / "checkpoint-12",
    ]


def test_name_that_something_of_the_user_has_is_refused_for_a_checkpoint(run):
    config, directory, mine = run
    before = snapshot(mine)
    refuse_taken_steps(directory, range(12, 100, 4))
    for refused in (
        lambda: refuse_taken_steps(directory, range(9, 100, 9)),
        lambda: save_training_state(directory / "checkpoint-9", {}, {}, {}, config),
    ):
        with pytest.raises(InputError, match="checkpoint-9 is in the way: this run did not write"):
            refused()
    assert snapshot(mine) == before


# --- overwrite=true -------------------------------------------------------------------------------


def finished(tmp_path, tokenizer):  # noqa: F811
    config = config_of(tmp_path)
    directory = prepare_run_directory(config, "sft")
    for name in ("metrics.jsonl", "timings.jsonl", "samples.jsonl", "watchdog.jsonl"):
        (directory / name).write_text("{}\n")
    make_checkpoint(directory, 4, config)
    for name in ("final", "critic"):
        write(directory / name, tokenizer, config=config)
    (directory / "rollouts").mkdir()
    (directory / "rollouts/update-000004.jsonl").touch()
    return directory


def test_overwrite_deletes_what_the_run_made_and_nothing_else(tmp_path, tokenizer):  # noqa: F811
    directory = finished(tmp_path, tokenizer)
    (directory / "final/report.png").touch()  # rlhf.reward.report has been run again
    (directory / "checkpoint-4.damaged").mkdir()
    mine = [directory / name for name in ("notes.txt", "checkpoint-backup-3", "wandb")]
    (directory / "rollouts/update-5.txt").touch()
    mine[0].write_text("mine")
    for folder in mine[1:]:
        folder.mkdir()
        (folder / "x").touch()
    before, first = snapshot(mine), (directory / "run.json").read_text()
    prepare_run_directory(config_of(tmp_path, overwrite=True), "sft")
    assert snapshot(mine) == before
    left = ["checkpoint-4.damaged", "config.yaml", "rollouts", "run.json"]
    assert names(directory) == sorted([*left, *(path.name for path in mine)])
    assert names(directory / "rollouts") == ["update-5.txt"]
    assert (directory / "run.json").read_text() != first


@pytest.mark.parametrize(
    "inside", ["final/README.md", "critic/x", "checkpoint-4/notes.txt", "checkpoint-9/x"]
)
def test_overwrite_refuses_to_delete_files_of_the_user(inside, tmp_path, tokenizer):  # noqa: F811
    directory = finished(tmp_path, tokenizer)
    (directory / inside).parent.mkdir(exist_ok=True)
    (directory / inside).write_text("mine")
    before = snapshot([directory])
    named = directory / ("checkpoint-9" if "9" in inside else inside)
    config = config_of(tmp_path, overwrite=True)
    # when the run starts, and again right before anything is deleted
    for refused in (lambda: refuse_used_directory(config, "sft"), lambda: clear(directory)):
        with pytest.raises(
            InputError, match=f"did not write these; move .*:\n  {re.escape(str(named))}$"
        ):
            refused()
    assert snapshot([directory]) == before


def test_overwrite_does_not_follow_links(tmp_path, tokenizer):  # noqa: F811
    directory = finished(tmp_path, tokenizer)
    elsewhere = tmp_path / "elsewhere"
    directory.rename(elsewhere)
    directory.symlink_to(elsewhere)  # a run on another disk
    prepare_run_directory(config_of(tmp_path, overwrite=True), "sft")
    assert names(elsewhere) == ["config.yaml", "run.json"] and directory.is_symlink()


# --- Something else where a file should be --------------------------------------------------------


@pytest.mark.parametrize(
    "name, kind, said",
    [
        ("metrics.jsonl", "directory", "is a directory, but the stage writes a file there"),
        ("samples.jsonl", "link", "is a link, but the stage writes a file there"),
        ("final", "link", "is a link, but the stage writes a directory there"),
        ("final", "file", "is a file, but the stage writes a directory there"),
        ("run.json", "directory", "is a directory, but the stage writes a file there"),
        (".", "file", "sft is a file, not a directory"),
        (".", "link", "sft is a broken link, not a directory"),
        ("..", "file", "mine is a file, not a directory"),
    ],
)
@pytest.mark.parametrize("values", [{"resume": "auto"}, {"overwrite": True}])
def test_what_is_in_the_way_of_a_stage_is_named(name, kind, said, values, tmp_path):
    path = tmp_path / "mine" / "sft" / name
    path = type(path)(os.path.normpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    {
        "directory": path.mkdir,
        "file": path.touch,
        "link": lambda: path.symlink_to(tmp_path / "nowhere"),
    }[kind]()
    with pytest.raises(InputError, match=said):
        prepare_run_directory(config_of(tmp_path, **values), "sft")
    assert os.path.lexists(path)
