"""`output.log`, the terminal output that a run keeps."""

from __future__ import annotations

import sys

import pytest

from rlhf.checkpoint.output import OUTPUT, kept_output
from rlhf.checkpoint.run_directory import open_run, refuse_used_directory
from rlhf.config import DatasetConfig, InputError, ModelConfig, SFTStageConfig
from rlhf.console import say, warn


def config_in(folder):
    model = ModelConfig(config={"model_type": "llama"}, tokenizer="gpt2")
    data = DatasetConfig(path="rows.jsonl")
    return SFTStageConfig(runs_dir=str(folder), model=model, dataset=data)


def kept(folder):
    """The lines of the file without those that say when."""
    lines = (folder / OUTPUT).read_text().splitlines()
    assert lines[0].startswith("=== 20")
    return [line for line in lines if not line.startswith("=== ")]


def test_a_run_keeps_what_it_shows_from_its_first_line_to_its_error(tmp_path, capsys):
    config, directory = config_in(tmp_path), tmp_path / "run/sft"
    with pytest.raises(InputError), open_run(config, "sft") as run:
        say("before the directory exists")
        run.begin([], [])
        warn("look")
        raise InputError("no more")
    lines = ["before the directory exists", "warning: look", "error: no more"]
    assert kept(directory) == lines
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (f"{lines[0]}\n", f"{lines[1]}\n")
    refuse_used_directory(config, "sft")  # the same command may be given again
    with pytest.raises(ZeroDivisionError), open_run(config, "sft") as run:
        run.begin([], [])
        say("again")
        1 / 0  # noqa: B018
    assert kept(directory)[: len(lines) + 1] == [*lines, "again"]
    assert kept(directory)[-1] == "ZeroDivisionError: division by zero"
    config.overwrite = True
    with open_run(config, "sft") as run:
        run.begin([], [])
    assert kept(directory) == []


def test_a_run_that_does_not_begin_leaves_no_output(tmp_path):
    with open_run(config_in(tmp_path), "sft"):
        say("refused soon")
    assert not any(tmp_path.iterdir())


def test_the_last_state_of_a_progress_bar_is_kept(tmp_path, capsys):
    with kept_output() as log:
        log.begin(tmp_path)
        for text in ("\r 0 of 2   ", "\r 1 of 2   ", "\r 2 of 2   ", "\n", "\r 0 of 1", "warning"):
            sys.stderr.write(text)
        print(": x\r\ny", file=sys.stderr)
    assert kept(tmp_path) == [" 2 of 2", "warning: x", "y"]
    assert capsys.readouterr().err.endswith("\r 0 of 1warning: x\r\ny\n")


def test_a_stream_that_outlives_its_run_still_shows(tmp_path, capsys):
    with kept_output() as log:
        log.begin(tmp_path)
        stream = sys.stdout
    print("late", file=stream)
    assert sys.stdout is not stream and kept(tmp_path) == []
    assert capsys.readouterr().out == "late\n"
