"""`resume=true run_name=mine` continues that run with its own configuration, or says why it cannot.

Leaves out that a continued run ends as one that never stopped (test_killed_runs.py).
Run: python -m pytest tests/end_to_end/test_continue_run.py
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.checkpoints import take_back_end, write
from helpers.tiny import tiny_tokenizer
from helpers.tiny_ppo import make_config, write_policy

from rlhf import train_ppo
from rlhf.checkpoint.ownership import facts_of_run, seal
from rlhf.checkpoint.run_directory import prepare_run_directory
from rlhf.cli import hydra_main
from rlhf.config import (
    CONF_DIR,
    STAGES,
    DatasetConfig,
    InputError,
    ModelConfig,
    PeftConfig,
    SFTStageConfig,
    groups_of,
    load_config,
    save_config,
)
from rlhf.metrics import read_jsonl


@pytest.fixture
def command(tmp_path, policy_dir, monkeypatch, capfd):
    """Run a stage's command in this process, in a folder with a model and a few rows.

    Returns (exit status, configuration that the stage got or None, stdout, stderr); `run` is what
    the stage does.
    """
    shutil.copytree(policy_dir, tmp_path / "own/model")
    answer = {"role": "assistant", "content": "apple"}
    rows = [
        {
            "instruction": text,
            "output": "apple",
            "messages": [{"role": "user", "content": text}, answer],
        }
        for text in (f"Name a fruit {i}" for i in range(8))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it; undone with the rest

    def call(stage, *args, run=lambda config: None):
        got, status = [], 0
        monkeypatch.setattr("sys.argv", [f"rlhf.{stage}", *args])
        try:
            hydra_main(stage, lambda config: (got.append(config), run(config))[1])
        except SystemExit as stop:
            status = stop.code
        output, errors = capfd.readouterr()
        return status, got[0] if got else None, output, errors

    return call


def sft_config(**values):
    """What a user's first command composes: nothing of it is a default."""
    values = {"run_name": "mine", "seed": 5, "runs_dir": "runs"} | values
    config = SFTStageConfig(
        model=ModelConfig(path="own/model", special_tokens=["### End"]),
        dataset=DatasetConfig(path="rows.jsonl", format="alpaca"),
        peft=PeftConfig(enabled=True, r=3),
        **values,
    )
    config.trainer |= {"learning_rate": 1e-3, "adam_beta1": 0.8}
    return config


def begun(config, *steps):
    """A run that began, and wrote checkpoints of these steps."""
    directory = prepare_run_directory(config, "sft")
    for step in steps:
        checkpointed(config, directory, step)
    return directory


def checkpointed(config, directory, step):
    checkpoint = directory / f"checkpoint-{step}"
    checkpoint.mkdir()
    save_config(config, checkpoint / "config.yaml")
    seal(checkpoint, directory, facts_of_run(directory))


# --- The run's own configuration ------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["true", "auto"])
def test_run_name_is_enough_to_continue_a_run(resume, command):
    config = sft_config()
    begun(config, 4)
    status, got, _, errors = command("sft", f"resume={resume}", "run_name=mine")
    assert (status, errors) == (0, "")
    config.resume = True if resume == "true" else "auto"
    assert got == config


def test_run_of_an_earlier_version_is_read_from_its_newest_complete_checkpoint(command):
    directory = begun(sft_config(), 4)
    checkpointed(sft_config(seed=6), directory, 12)
    (directory / "config.yaml").unlink()
    for name in ("checkpoint-20", "checkpoint-backup-30", "checkpoint-40-old"):
        shutil.copytree(directory / "checkpoint-4", directory / name)
    (directory / "checkpoint-20/manifest.json").unlink()
    _, got, _, _ = command("sft", "resume=true", "run_name=mine")
    assert got.seed == 6


def test_command_line_is_laid_over_the_configuration_of_the_run(command, tmp_path):
    own = tmp_path / "own/recipe"
    own.mkdir(parents=True)
    (own / "small.yaml").write_text("# @package _global_\nresponse_length: 9\n")
    begun(sft_config())
    given = ["--config-dir", "own", "recipe=small", "dataset=messages", "peft=lora", "top_p=0.5"]
    given += ["+trainer.adam_beta1=0.7", "trainer.adam_beta2=0.9"]
    _, got, _, _ = command("sft", "resume=auto", "run_name=mine", *given)
    expected = sft_config(resume="auto", response_length=9, top_p=0.5)
    expected.dataset.format, expected.peft = "messages", PeftConfig(enabled=True)
    expected.trainer |= {"adam_beta1": 0.7, "adam_beta2": 0.9}
    assert got == expected


def test_paths_inside_the_run_follow_it_when_it_is_moved(command, tmp_path):
    config = sft_config()
    config.model.path, config.dataset.path = "runs/mine/base", "runs/minerals.jsonl"
    begun(config, 4)
    (tmp_path / "own/model").rename(tmp_path / "runs/mine/base")
    (tmp_path / "runs").rename(tmp_path / "archive")
    (tmp_path / "archive/mine").rename(tmp_path / "archive/old")
    (tmp_path / "runs").mkdir()
    (tmp_path / "rows.jsonl").rename(tmp_path / "runs/minerals.jsonl")
    _, got, _, _ = command("sft", "resume=true", "run_name=old", "runs_dir=archive")
    assert (got.run_name, got.runs_dir) == ("old", "archive")
    assert got.model.path == str(Path("archive/old/base"))
    assert got.dataset.path == "runs/minerals.jsonl"


def test_permission_to_run_a_models_code_is_typed_again(command):
    config = sft_config()
    config.model.trust_remote_code = True
    begun(config, 4)
    arguments = ["resume=true", "run_name=mine"]
    status, _, _, errors = command("sft", *arguments)
    assert status == 2 and "type model.trust_remote_code=true again" in errors
    assert command("sft", *arguments, "model.trust_remote_code=true")[1].model.trust_remote_code


def test_new_run_does_not_read_what_is_there(command):
    begun(sft_config(), 4)
    for given in ("resume=false", "overwrite=true"):
        status, got, _, errors = command("sft", given, "run_name=mine")
        assert (status, got) == (2, None)
        assert "missing values:" in errors


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_groups_that_can_be_laid_over_a_run_are_those_of_the_stage(stage):
    defaults = yaml.safe_load((CONF_DIR / f"{stage}.yaml").read_text())["defaults"]
    groups = {name for entry in defaults if isinstance(entry, dict) for name in entry}
    assert {name for name in groups if " " not in name} - {"recipe", "stage"} == set(
        groups_of(STAGES[stage])
    )


# --- Nothing to continue --------------------------------------------------------------------------


def test_unknown_run_name_is_an_error_with_the_nearest_names(command):
    begun(sft_config(), 4)
    status, got, _, errors = command("sft", "resume=true", "run_name=mime")
    assert (status, got) == (2, None)
    (line,) = errors.splitlines()
    assert line.startswith(
        "error: resume=true: there is no run_name=mime in runs. Did you mean mine?"
    )
    assert line.endswith("resume=auto continues a run or starts it")
    assert not Path("runs/mime").exists()


def test_unknown_run_name_that_is_like_no_other_is_an_error_with_all_names(command):
    begun(sft_config(), 4)
    _, _, _, errors = command("sft", "resume=true", "run_name=experiment")
    assert "in runs. Its runs with a sft stage: mine. To begin a new run, start it" in errors


def test_run_without_this_stage_is_an_error(command):
    begun(sft_config(), 4)
    status, _, _, errors = command("ppo", "resume=true", "run_name=mine")
    assert status == 2
    assert f"the run {Path('runs/mine')} has no ppo stage; start it without resume=true" in errors


def test_run_that_never_reached_a_checkpoint_is_an_error_and_starts_with_auto(tmp_path):
    config = sft_config(runs_dir=str(tmp_path), resume=True)
    begun(sft_config(runs_dir=str(tmp_path)))
    with pytest.raises(
        InputError, match="never reached a checkpoint.*resume=auto .*starts it again"
    ):
        begun(config)
    config.resume = "auto"
    assert load_config(SFTStageConfig, begun(config) / "config.yaml") == config


def test_auto_without_a_run_takes_the_command_line_alone(command):
    status, _, _, errors = command("sft", "resume=auto", "run_name=new")
    assert status == 2 and errors.startswith("error: missing values:")
    given = ["dataset.path=rows.jsonl", "model.path=own/model"]
    assert command("sft", "resume=auto", "run_name=new", *given)[1].dataset.path == "rows.jsonl"


def test_damaged_configuration_is_named(command):
    directory = begun(sft_config(), 4)
    for text in ("model: [", "seed: 3", "just words"):
        (directory / "config.yaml").write_text(text)
        status, _, _, errors = command("sft", "resume=true", "run_name=mine")
        assert status == 2
        assert errors.startswith(f"error: {Path('runs/mine/sft/config.yaml')} is damaged (")


# --- What a refusal proposes works ----------------------------------------------------------------


def killed_early(config):
    (begun(config) / "metrics.jsonl").write_text("")


def stopped(config):
    begun(config, 4)


def without_checkpoints(config):
    write(begun(config) / "final", tiny_tokenizer(), config=config)


def finished(config):
    directory = begun(config)
    write(directory / "final", tiny_tokenizer(), config=config)
    checkpoint = directory / "checkpoint-6"
    checkpoint.mkdir()
    save_config(config, checkpoint / "config.yaml")
    (checkpoint / "trainer_state.json").write_text('{"epoch": 3.0}')
    seal(checkpoint, directory, facts_of_run(directory))


def _slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


PROPOSALS = [  # what is there, what is typed, what the refusal proposes
    _slow(killed_early, "run_name=mine", "resume=auto run_name=mine"),
    _slow(killed_early, "resume=true run_name=mine", "resume=auto run_name=mine"),
    (stopped, "run_name=mine", "resume=true run_name=mine"),
    _slow(stopped, "resume=true run_name=mine seed=9", "resume=true run_name=mine"),
    (stopped, "resume=true run_name=mime", "resume=true run_name=mine"),  # Did you mean mine?
    (finished, "run_name=mine", "resume=true run_name=mine trainer.num_train_epochs=6"),
    _slow(finished, "resume=true run_name=mine seed=9", "resume=true run_name=mine"),
    _slow(without_checkpoints, "run_name=mine", "overwrite=true"),
    (without_checkpoints, "resume=true run_name=mine trainer.num_train_epochs=9", "model.path=X"),
]


@pytest.mark.parametrize("prepare, typed, proposed", PROPOSALS)
def test_what_a_refusal_of_a_run_directory_proposes_is_accepted(prepare, typed, proposed, command):
    prepare(sft_config())
    full = ["model.path=own/model", "dataset.path=rows.jsonl", "dataset=alpaca"]
    given = typed.split() if "resume" in typed else [typed, *full]
    status, got, _, errors = command("sft", *given)
    assert (status, got) == (2, None)
    final = Path("runs/mine/sft/final")
    proposed = proposed.replace("X", str(final))
    assert proposed in errors or ("mime" in typed and "Did you mean mine?" in errors)
    if proposed.startswith("model.path"):  # a new run from the result
        shutil.copytree("own/model", final, dirs_exist_ok=True)
        (final / "rlhf.json").unlink()
        again = ["run_name=new", proposed, *full[1:]]
    else:
        again = proposed.split() if "resume" in proposed else [proposed, "run_name=mine", *full]
    status, got, _, errors = command("sft", *again)
    assert (status, errors) == (0, "") and got is not None


def test_missing_stage_is_made_by_the_command_that_the_refusal_names(command):
    begun(sft_config(runs_dir="elsewhere"), 4)
    given = ["run_name=mine", "runs_dir=elsewhere", "dataset.path=rows.jsonl"]
    _, _, _, errors = command("reward", *given)
    way = "`python -m rlhf.sft resume=auto run_name=mine runs_dir=elsewhere`"
    assert f"sft/final does not exist; finish that stage with {way}, or set" in errors
    assert command("sft", *way.strip("`").split()[3:])[0] == 0


# --- A real run -----------------------------------------------------------------------------------


def test_stopped_finished_and_changed_run_on_the_command_line(command, tmp_path):
    config = make_config(write_policy(tmp_path / "policy"), tmp_path)
    config.run_name, config.runs_dir = "mine", "runs"
    train_ppo(config)
    directory = tmp_path / "runs/mine/ppo"
    whole = read_jsonl(directory / "metrics.jsonl")
    config.ppo.missing_eos_penalty = None  # what auto is for a Python scorer
    assert load_config(type(config), directory / "config.yaml") == config
    arguments = ["resume=true", "run_name=mine"]

    def train(config):
        return train_ppo(config).stopped_by

    status, _, output, _ = command("ppo", *arguments, run=train)
    assert status == 0
    longer = "ppo.num_updates=8 would make it longer"
    assert output.endswith(f"ppo is finished: nothing to do ({longer})\n")
    take_back_end(directory)
    status, _, _, errors = command("ppo", *arguments, "ppo.kl_coef=0.1", run=train)
    assert status == 2 and "\n  ppo.kl_coef: 0.05 -> 0.1\n" in errors
    status, _, output, _ = command("ppo", *arguments, "evaluation.every=2", run=train)
    assert status == 0 and f"resuming from {Path('runs/mine/ppo/checkpoint-2')}" in output
    assert read_jsonl(directory / "metrics.jsonl") == whole
