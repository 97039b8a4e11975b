"""Names of options: a command takes those of the stages' settings, and old ones for one release."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.chat import ChatOptions
from rlhf.cli import run_to_exit
from rlhf.config import InputError, SFTStageConfig
from rlhf.console import say
from rlhf.generate import GenerateOptions
from rlhf.option_parser import read_options, run_command
from rlhf.pipeline import PipelineOptions
from rlhf.score import ScoreOptions


def test_an_old_name_works_and_names_the_new_one(capsys):
    assert read_options(ChatOptions, ["path=a", "max_new_tokens=7"]).response_length == 7
    line = "max_new_tokens is now called response_length; the old name goes away\n"
    assert capsys.readouterr().err == line


def test_the_names_of_the_stages_settings_are_options_of_every_command(capsys):
    score = read_options(
        ScoreOptions,
        ["path=a", "dataset.path=b", "scorer.normalize=none", "model.dtype=auto", "batch_size=2"],
    )
    assert (score.path, score.data, score.normalize) == ("a", "b", "none")
    assert (score.dtype, score.batch_size) == ("auto", 2)
    answers = read_options(
        GenerateOptions, ["path=a", "dataset.path=b", "ppo.response_length=5", "ppo.top_k=3"]
    )
    assert (answers.path, answers.prompts, answers.response_length) == ("a", "b", 5)
    assert read_options(ChatOptions, ["path=a", "model.chat_template=plain"]).chat_template
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("argument", ["scorer.path=b", "ppo.kl_coef=1", "response_lenght=3"])
def test_a_setting_that_is_no_option_stays_unknown(argument):
    name = argument.partition("=")[0]
    with pytest.raises(InputError, match=f"unknown option '{name}'"):
        read_options(ChatOptions, ["path=a", argument])


def test_overrides_for_the_stages_stay_as_they_are():
    given = ["ppo.stages=1", "max_new_tokens=3"]
    assert read_options(PipelineOptions, given).overrides == given


def test_the_help_of_every_command_begins_with_what_to_type():
    for file in sorted((Path(__file__).parents[2] / "rlhf").rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        if "run_command(str(__doc__)" in source:
            usage = ast.get_docstring(ast.parse(source))
            assert "python -m rlhf." in usage, f"{file} has no example in its --help"


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_every_command_but_the_stages_refuses_the_processes_of_a_launcher(
    name, monkeypatch, capsys
):
    monkeypatch.setenv(name, "2")
    assert run_command("", ChatOptions, lambda options: pytest.fail("it ran"), ["path=a"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name}=2: only rlhf.sft, rlhf.reward and rlhf.ppo run in")
    monkeypatch.setenv(name, "1")
    assert run_command("", ChatOptions, lambda options: 0, ["path=a"]) == 0


def test_torchrun_with_two_processes_of_a_command_prints_one_error_and_writes_nothing(
    tmp_path, policy_dir
):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "rlhf.export", f"path={policy_dir}", "out=exported"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert done.stderr.count("error: WORLD_SIZE=2: only rlhf.sft") == 1, done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["stage", "command"])
def test_a_terminal_in_another_encoding_shows_what_it_can(kind, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    if kind == "stage":
        run_to_exit(lambda _: say("\U0001f600 yes"), SFTStageConfig())
    else:
        assert run_command("", ChatOptions, lambda _: say("\U0001f600 yes"), ["path=a"]) == 0
    assert stdout.buffer.getvalue() == b"\\U0001f600 yes\n"


def test_a_file_that_the_system_refuses_is_named_and_an_error_of_a_connection_stays(capsys):
    def read(options):
        Path(options.path).read_text()

    def connect(options):
        raise ConnectionRefusedError(111, "Connection refused")

    assert run_command("", ScoreOptions, read, ["path=/gone/rows.jsonl"]) == 2
    assert capsys.readouterr().err == "error: /gone/rows.jsonl: No such file or directory\n"
    with pytest.raises(ConnectionRefusedError):
        run_command("", ScoreOptions, connect, ["path=a"])
