"""The three commands as a user meets them: quick answers, and one clear line for an error.

Leaves out what the stages do once they train.
Run: python -m pytest tests/commands/test_command_line.py
"""

import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from rlhf.cli import hydra_arguments, hydra_main, name_sweep_run, runs_demo
from rlhf.config import STAGES as STAGE_CLASSES
from rlhf.config import PPOStageConfig, RewardStageConfig, SFTStageConfig, config_keys, override
from rlhf.config.synonyms import SYNONYMS
from rlhf.overrides import jobs, swept_keys, with_texts, wrong_overrides

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["sft", "reward", "ppo"]


def run_python(*args, cwd, **env):
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK": "0"} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Run a stage's command in this process, in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it; undone with the rest

    def run(stage, *args):
        monkeypatch.setattr("sys.argv", [f"rlhf.{stage}", *args])
        try:
            hydra_main(stage, lambda config: pytest.fail("the stage began"))
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def composed(command):
    """What `--cfg job` prints, as a dict."""

    def compose(stage, *args):
        status, output, errors = command(stage, "--cfg", "job", *args)
        assert (status, errors) == (0, "")
        return yaml.safe_load(output)

    return compose


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A user's --config-dir."""
    folder = tmp_path_factory.mktemp("own")
    for name, text in {
        "recipe/mine.yaml": "# @package _global_\nseed: 7\nppo:\n  kl_coef: 0.3\n",
        "recipe/typo.yaml": "# @package _global_\nppo:\n  kl_coeff: 0.1\n",
        "recipe/wrong.yaml": "# @package _global_\nppo:\n  kl_coef: much\n",
        "recipe/broken.yaml": "# @package _global_\nppo: [1\n",
        "recipe/trusting.yaml": "# @package _global_\nmodel:\n  trust_remote_code: true\n",
        "dataset/mine.yaml": "path: rows.jsonl\nformat: alpaca\n",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


# --- Quick answers --------------------------------------------------------------------------------

PROBE = """
import atexit, os, runpy, sys
heavy = {"torch", "transformers", "trl", "datasets", "accelerate", "numpy", "wandb"}
atexit.register(lambda: print("heavy:", sorted(heavy & set(sys.modules)), file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=False)
"""


@pytest.mark.parametrize(
    "stage, args, status, answer",
    [
        ("sft", ["--cfg", "job"], 0, "run_name: demo"),
        ("reward", ["--help"], 0, "python -m rlhf.reward"),
        ("ppo", ["--help"], 0, "python -m rlhf.ppo"),
        ("ppo", ["ppo.kl_coeff=1"], 2, ""),
    ],
)
def test_command_answers_without_importing_torch(stage, args, status, answer, tmp_path):
    done = run_python("-c", PROBE, f"rlhf.{stage}", *args, cwd=tmp_path)
    assert done.returncode == status
    assert done.stderr.splitlines()[-1] == "heavy: []"
    assert answer in done.stdout
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_command_answers_within_a_second_of_processor_time(tmp_path):
    def seconds(*args):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_python(*args, cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    for option in ("--cfg=job", "--help"):
        hydra_alone = []
        while seconds("-m", "rlhf.ppo", option) >= 1.0:
            # the same machine at times takes twice as long for everything
            hydra_alone.append(seconds("-c", "import hydra"))
            if max(hydra_alone) > 0.2:
                pytest.skip(f"a busy or slow processor: importing hydra took {hydra_alone[-1]} s")
            assert len(hydra_alone) < 5, option


def test_command_answers_without_torch(tmp_path):
    for option in ("--cfg=job", "--help"):
        done = run_python("-X", "importtime", "-m", "rlhf.ppo", option, cwd=tmp_path)
        modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "rlhf.cli" in modules and not modules & {"torch", "transformers", "trl", "numpy"}


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_groups_ten_knobs_and_where_the_rest_is(stage, command):
    status, output, errors = command(stage, "--help")
    assert (status, errors) == (0, "")
    knobs = [line for line in output.splitlines() if re.match(r"  [a-z_.]+=\S*$", line)]
    assert len(knobs) == 10
    assert "  run_name=run" in knobs
    for text in ("  dataset   alpaca, ", "  recipe    alpaca, ", f"{stage}.yaml", "--cfg job"):
        assert text in output
    assert max(map(len, output.splitlines())) <= 100


def test_help_of_a_knob_is_its_default_its_sentence_and_its_range(command):
    _, output, _ = command("ppo", "-h")
    text = "Weight of the KL penalty, score units per nat. Must be >= 0."
    assert f"  ppo.kl_coef=0.05\n            {text}\n" in output


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, args, message",
    [
        ("ppo", ["ppo.kl_coeff=0.1"], "unknown key 'ppo.kl_coeff'. Use ppo.kl_coef."),
        ("ppo", ["+ppo.kl_coeff=0.1"], "unknown key 'ppo.kl_coeff'. Use ppo.kl_coef."),
        ("sft", ["dataset_path=x"], "unknown key 'dataset_path'. Use dataset.path"),
        ("ppo", ["ppo.kl_coef=much"], "ppo.kl_coef: Value 'much' of type 'str' could not be"),
        ("reward", ["seed=1.5"], "seed: Value '1.5' of type 'float' could not be converted"),
        ("ppo", ["recipe=typo"], "In 'recipe/typo': unknown key 'ppo.kl_coeff'. Use ppo.kl"),
        ("ppo", ["recipe=trusting"], "model.trust_remote_code=true comes from a file; only the"),
        ("ppo", ["recipe=wrong"], "In 'recipe/wrong': ppo.kl_coef: Value 'much' of type 'str'"),
        ("ppo", ["recipe=broken"], "not valid YAML: while parsing a flow sequence"),
        ("ppo", ["recipe=vicuna"], "recipe=vicuna has no ppo stage (it has sft); to start from"),
        ("ppo", ["recipe=gone"], "recipe=gone does not exist; choose one of alpaca, "),
        ("sft", ["dataset=gone"], "dataset=gone does not exist; choose one of alpaca, "),
        ("ppo", ["recipe=demo", "ppo.kl_coef=-1"], "ppo.kl_coef must be >= 0, got -1.0"),
        ("sft", ["dataset.path=[a (1).jsonl"], "cannot read 'dataset.path=[a (1).jsonl' ("),
        ("sft", ["seed"], "cannot read 'seed' (missing EQUAL at '<EOF>'); write key=value"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    stage, args, message, own, command, tmp_path, monkeypatch
):
    # the stages that a run starts from
    for before in ("sft", "reward"):
        (tmp_path / f"runs/demo/{before}/final").mkdir(parents=True)
    monkeypatch.setattr("rlhf.inputs.check_model", lambda *_, **__: None)
    status, output, errors = command(stage, "--config-dir", own, *args)
    (line,) = errors.splitlines()
    assert line.startswith(f"error: {message}")
    assert (status, output) == (2, "")


def test_missing_config_dir_is_named(command):
    status, _, errors = command("sft", "--config-dir", "nowhere")
    assert status == 2
    assert errors.startswith("error: Additional config directory '")
    assert errors.count("\n") == 1


def test_recipe_null_lists_everything_that_is_missing(command):
    status, _, errors = command("ppo", "recipe=null")
    title, *lines = errors.splitlines()
    assert (status, title) == (2, "error: missing values:")
    keys = [line.split(":")[0].strip() for line in lines]
    assert keys == ["dataset.path", "model.path", "scorer.path"]


def test_python_scorer_without_a_function_is_refused(command):
    status, _, errors = command("ppo", "scorer=python", "dataset.path=x", "model.path=x")
    assert status == 2
    assert "scorer.path: a function, e.g. scorer.path=my_module.my_score" in errors


def test_another_rank_prints_the_error_with_its_number_after_the_first_had_its_say(
    command, monkeypatch
):
    waited = []
    monkeypatch.setattr("rlhf.console.time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setenv("RANK", "1")
    status, output, errors = command("ppo", "ppo.kl_coeff=0.1")
    assert (status, output, waited) == (2, "", [3.0])
    assert errors.startswith("error: rank 1: unknown key 'ppo.kl_coeff'.")


# --- What is composed -----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("given", [[], ["recipe=demo", "seed=3"]])
def test_without_arguments_or_when_asked_for_the_demo_runs(stage, given, composed):
    config = composed(stage, *given)
    assert (config["run_name"], config["seed"]) == ("demo", 3 if given else 1)
    assert config["dataset"]["path"] == "python:rlhf.demo.world.rows"


@pytest.mark.parametrize(
    "arguments, demo",
    [
        ([], True),
        (["--cfg", "job", "--resolve"], True),
        (["--cfg=job"], True),
        (["--version"], True),
        (["-m"], False),
        (["--config-dir", "own"], False),
        (["--cfg", "job", "seed=2"], False),
        (["run_name=mine"], False),
    ],
)
def test_demo_runs_without_arguments_other_than_options_that_print(arguments, demo):
    assert runs_demo(arguments) == demo


@pytest.mark.parametrize("given", ["seed=2", "run_name=mine", "ppo.num_updates=10"])
def test_any_argument_makes_missing_values_an_error_that_names_the_demo(given, command):
    status, _, errors = command("ppo", given)
    title, *lines, last = errors.splitlines()
    assert (status, title) == (2, "error: missing values:")
    assert [line.split(":")[0].strip() for line in lines] == [
        *("dataset.path", "model.path", "scorer.path")
    ]
    assert last == "(recipe=demo runs the embedded demo, which needs none of them)"


@pytest.mark.parametrize(
    "work", ["dataset.path=x", "model.path=x", "dataset=hh", "recipe=null", "seed=2"]
)
def test_own_work_is_not_the_demo(work, composed):
    config = composed("sft", work)
    assert config["run_name"] == "run"
    assert config["model"]["config"] == {}


def test_users_recipe_and_data_set_apply_and_the_command_line_wins(own, composed):
    args = ["recipe=mine", "dataset=mine", "--config-dir", own, "ppo.kl_coef=0.4"]
    config = composed("ppo", *args)
    assert (config["seed"], config["ppo"]["kl_coef"]) == (7, 0.4)
    assert (config["dataset"]["path"], config["dataset"]["format"]) == ("rows.jsonl", "alpaca")
    assert config["run_name"] == "run"


@pytest.mark.parametrize(
    "given, sorted_",
    [
        (["a=1", "--cfg", "job", "b=2"], ["--cfg", "job", "a=1", "b=2"]),
        (["a=1", "-m", "b=2"], ["-m", "a=1", "b=2"]),
        (["a=1", "--config-dir=own", "b=2"], ["--config-dir=own", "a=1", "b=2"]),
        (["a=1", "--cfg"], ["--cfg", "a=1"]),
        (["--cfg", "job"], ["--cfg", "job", "recipe=demo"]),
        (["recipe=null", "a=1"], ["a=1"]),
    ],
)
def test_hydra_gets_options_first_the_demo_without_work_and_no_null_recipe(given, sorted_):
    assert hydra_arguments(given) == sorted_


# --- Sweeps ---------------------------------------------------------------------------------------


def job(config, swept, *overrides):
    """The configuration of a job of a sweep."""
    name_sweep_run(config, swept, list(overrides))
    return config


def test_jobs_of_a_sweep_are_named_after_what_differs():
    given = ["ppo.kl_coef=0.01,0.2", "run_name=sw", "seed=1,2", "recipe=demo"]
    swept = swept_keys(given)
    names = [job(PPOStageConfig(run_name="sw"), swept, *each).run_name for each in jobs(given)]
    assert names == [f"sw-kl_coef-{kl}-seed-{seed}" for kl in (0.01, 0.2) for seed in (1, 2)]


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("dataset.path=a/b.jsonl", "run-path-a_b.jsonl"),
        ("ppo.adam_betas=[0.9,0.95]", "run-adam_betas-0.9_0.95"),
        ("+trainer.optim=adam", "run-optim-adam"),
        (f"dataset.path={'x' * 80}", f"run-path-{'x' * 32}"),
    ],
)
def test_run_name_of_a_job_is_short_and_can_be_typed(override, name, command):
    key = override.lstrip("+").partition("=")[0]
    assert job(SFTStageConfig(), [key], override).run_name == name
    assert command("sft", "--cfg", "job", f"run_name={name}")[0] == 0


def test_run_name_is_kept_where_the_sweep_sets_it_or_there_is_none():
    assert job(SFTStageConfig(run_name="a"), ["run_name"], "run_name=a").run_name == "a"
    assert job(SFTStageConfig(), [], "seed=1").run_name == "run"


def test_jobs_of_a_sweep_start_from_the_stages_of_the_named_run(tmp_path):
    for stage in ("sft", "reward"):
        (tmp_path / "run" / stage / "final").mkdir(parents=True)
    config = job(PPOStageConfig(runs_dir=str(tmp_path)), ["seed"], "seed=1")
    assert config.stage_dir("ppo") == tmp_path / "run-seed-1" / "ppo"
    assert config.model.path == str(tmp_path / "run/sft/final")
    assert config.scorer.path == str(tmp_path / "run/reward/final")


def test_a_sweep_prefers_its_own_stages_and_given_paths(tmp_path):
    for run in ("run", "run-seed-1"):
        (tmp_path / run / "sft" / "final").mkdir(parents=True)
    mine = RewardStageConfig(runs_dir=str(tmp_path))
    assert job(mine, ["seed"], "seed=1").model.path is None
    given = RewardStageConfig(runs_dir=str(tmp_path))
    given.model.path = "other"
    assert job(given, ["seed"], "seed=2").model.path == "other"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["temperature=1,0"], "temperature must be > 0, got 0"),
        (["dataset.path=rows.jsonl,gone.jsonl"], "dataset.path='gone.jsonl' is neither a file"),
        (["seed=1,1"], "2 jobs of the sweep have 1 names: sw-seed-1 is given twice"),
        (["precision=auto,float12"], "precision must be one of auto, float32, bfloat16, got"),
        (["seed=1,high"], "seed: Value 'high' of type 'str' could not be converted"),
        (["dataset=alpaca,alpacca"], "dataset=alpacca does not exist; choose one of alpaca"),
    ],
)
def test_a_sweep_is_refused_before_its_first_job_if_any_job_cannot_work(
    args, message, command, tmp_path, monkeypatch
):
    monkeypatch.setattr("rlhf.inputs.check_model", lambda *_, **__: None)
    row = '{"prompt": "Name a fruit.", "completion": "An apple."}\n'
    (tmp_path / "rows.jsonl").write_text(row.replace("a fruit", "fruit 1") + row)
    common = ["dataset=prompt_completion", "dataset.path=rows.jsonl", "dataset.eval_fraction=0.5"]
    status, _, errors = command("sft", "-m", "run_name=sw", "model.path=x", *common, *args)
    assert status == 2
    assert message in errors


# --- Wrong keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "override", "ours"),
    [
        ("sft", "lr=1e-4", "trainer.learning_rate"),
        ("ppo", "lr=1e-4", "ppo.learning_rate"),
        ("ppo", "ppo.lr=1e-4", "ppo.learning_rate"),
        ("sft", "epochs=3", "trainer.num_train_epochs"),
        ("ppo", "epochs=3", "ppo.num_updates"),
        ("ppo", "batch_size=8", "ppo.batch_size"),
        ("ppo", "kl=0.1", "ppo.kl_coef"),
        ("ppo", "beta=0.1", "ppo.kl_coef"),
        ("reward", "max_steps=3", "trainer.max_steps"),
        ("sft", "output_dir=x", "run_name or runs_dir"),
        ("sft", "lora_r=8", "peft.r"),
        ("sft", "data=x.jsonl", "dataset.path"),
    ],
)
def test_a_name_of_another_framework_is_answered_with_ours(stage, override, ours):
    problem = wrong_overrides([override], stage, own_files=False)[override]
    assert problem.startswith(f"unknown key {override.partition('=')[0]!r}. Use {ours}.")


def test_every_synonym_names_a_key_that_some_stage_has():
    known = {key for config_class in STAGE_CLASSES.values() for key in config_keys(config_class)}
    keys = {key for keys in SYNONYMS.values() for key in keys}
    assert {key for key in keys - known if not key.startswith("trainer.")} == set()


def test_a_path_in_place_of_a_choice_is_answered_with_the_key_for_paths(command):
    _, _, errors = command("sft", "model=org/gpt2", "dataset=rows.jsonl")
    assert "for a path, set model.path=org/gpt2\n" in errors
    assert "for a path, set dataset.path=rows.jsonl\n" in errors


def test_all_wrong_overrides_and_values_are_named_at_once(command):
    args = ["ppo.lr=1", "seed=high", "dataset=gone", "ppo.gamma=2", "scorer.path=./nope", "a"]
    status, _, errors = command("ppo", *args)
    assert status == 2
    for text in ("'ppo.lr'", "seed: Value", "dataset=gone", "ppo.gamma must", "nope", "read 'a'"):
        assert text in errors
    assert "missing values" not in errors  # the wrong ones may be meant for them
    assert command("ppo", *args, "--cfg", "job")[0] == 2


@pytest.mark.parametrize(
    "key, value",
    [
        *(("run_name", name) for name in ("2026_11_29", "1e5", "true", "nan", "lr=1e-5", "x[1]")),
        *(("dataset.path", path) for path in ("/home/josé/a(1).jsonl", "a~b;c#d.jsonl")),
        ("model.revision", "7e4"),
    ],
)
def test_a_text_reaches_a_stage_as_it_was_typed(key, value, command):
    status, shown, _ = command("sft", "model.path=m", f"{key}={value}", "--cfg", "job")
    assert status == 0
    for name in key.split("."):
        shown = yaml.safe_load(shown)[name] if isinstance(shown, str) else shown[name]
    assert shown == value


def test_numbers_stay_numbers_and_what_is_meant_for_hydra_stays():
    given = ["seed=5", "trainer.max_steps=5", "run_name=a,b", "run_name='5'", "dataset.path=[a,b]"]
    given += ["dataset.path=[a", "nope=é", "resume=true", "~seed", "hydra/launcher=basic", "+x=3"]
    assert with_texts(given, "sft") == given


@pytest.mark.parametrize("name", ["a b", "a,b", 'say "x"', "a\\", 'a\\"b', "é", "it's", "a\nb"])
def test_a_command_for_the_next_stage_gives_the_name_of_the_run(name, command):
    [typed] = shlex.split(override("run_name", name))
    status, shown, _ = command("sft", "model.path=m", typed, "--cfg", "job")
    assert status == 0 and yaml.safe_load(shown)["run_name"] == name
