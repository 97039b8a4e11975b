"""Commands refuse what needs no torch without importing it, and everything at once.

Run: python -m pytest tests/commands/test_early_refusals.py
"""

import json
import runpy
import sys

import pytest
from helpers.commands import run, run_in_forks
from helpers.tiny_ppo import make_config

from rlhf.config import (
    DatasetConfig,
    EvaluationConfig,
    InputError,
    ModelConfig,
    PPOConfig,
    PPOStageConfig,
    ScorerConfig,
)
from rlhf.inputs import check_inputs

TORCH = 'raise SystemExit("torch was imported")\n'
ROWS = "dataset=prompt_completion dataset.path=rows.jsonl run_name=new"
LONG = "x" * 300
COMMANDS = {
    f"rlhf.sft model.path=./nope model.chat_template=vicunna {ROWS} dataset.path=gone.jsonl "
    "mix.fraction=0.5 mix.path=no_texts.jsonl": [
        "model.path=./nope: no such directory",
        "model.chat_template='vicunna' is neither",
        "dataset.path='gone.jsonl' is neither a file nor a directory",
        "mix.path='no_texts.jsonl' is neither a file nor a directory",
    ],
    f"rlhf.sft model.path=runs/mine temperature=0 {ROWS} dataset.path=bad.jsonl": [
        "temperature must be > 0",
        "runs/mine/sft/final?",
        "bad.jsonl, row 1: not valid JSON",
    ],
    f"rlhf.reward model.path=./nope {ROWS} run_name=mine normalization.path=gone.jsonl "
    "normalization.completions=demonstrations": [
        "model.path=./nope: no such directory",
        "field 'responses': missing or null",
        "runs/mine/reward already holds an unfinished run",
        "normalization.path='gone.jsonl' is neither a file nor a directory",
    ],
    f"rlhf.ppo model.path=./nope scorer.path=runs/mine/sft/final {ROWS} ppo.reference=./nowhere "
    "evaluation.scorer=runs/mine/sft/final ptx.coef=1 ptx.path=gone.jsonl model.tokenizer=./no": [
        "model.path=./nope: no such directory",
        "model.tokenizer=./no: no such directory",
        "ppo.reference=./nowhere: no such directory",
        "\nscorer.path=runs/mine/sft/final was written by the sft stage",
        "evaluation.scorer=runs/mine/sft/final was written by the sft stage",
        "ptx.path='gone.jsonl' is neither a file nor a directory",
    ],
    "rlhf.ppo scorer.components=[{path:gone.score},{path:./nope}] dataset.path=python:gone.rows "
    "model.tokenizer=python:gone.make run_name=new": [
        "scorer.components[0].path='gone.score' cannot be imported",
        "scorer.components[1].path=./nope: no such directory",
        "dataset.path='python:gone.rows' cannot be imported",
        "model.tokenizer='python:gone.make' cannot be imported",
    ],
    "rlhf.ppo scorer.path=my_module.score evaluation.scorer=other.score run_name=new": [
        "scorer.path='my_module.score' cannot be imported",
        "evaluation.scorer='other.score' cannot be imported",
        "missing values:",
        "dataset.path: file or Hub name",
        "model.path: runs/new/sft/final does not exist",
    ],
    "rlhf.pipeline model.path=./nope dataset.path=gone.jsonl run_name=new": [
        "model.path=./nope: no such directory",
        "dataset.path='gone.jsonl'",
        "nothing was started",
    ],
    "rlhf.chat path=./nope": ["path=./nope: no such directory"],
    "rlhf.chat path=runs/mine chat_template=vicunna": [
        "runs/mine/sft/final?",
        "chat_template='vicunna' is neither",
    ],
    "rlhf.score path=runs/mine/sft/final data=gone.jsonl": [
        "data=gone.jsonl is not a file",
        "path=runs/mine/sft/final was written by the sft stage",
    ],
    "rlhf.evaluate a=./nope b=gone.jsonl prompts=no.jsonl by=scorer scorer=runs/mine/sft/final": [
        "a=./nope: no such directory",
        "b=gone.jsonl is not a file",
        "prompts=no.jsonl is not a file",
        "scorer=runs/mine/sft/final was written by the sft stage",
    ],
    "rlhf.score path=judge:kindness model=x data=rows.jsonl": ["there is no rubric"],
    "rlhf.sft model.path=./nope trainer.learning_rate=high trainer.max_steps=0 trainer.bf16=true": [
        "trainer.learning_rate must be a number, got 'high'",
        "trainer.max_steps must be >= 1, or -1",
        "trainer.bf16 cannot be set: set precision=bfloat16",
    ],
    "rlhf.generate mode=self_instruct path=runs/mine/reward seeds=rows.jsonl": [
        "path=runs/mine/reward"
    ],
    "rlhf.export path=./nope out=policy": ["path=./nope: no such directory"],
    "rlhf.reward.report path=./nope": ["path=./nope: no such directory"],
    f"rlhf.sft model.path=model dataset.path=rows.jsonl run_name={LONG}": ["run_name must be one"],
    f"rlhf.sft resume=true run_name={LONG}": ["File name too long"],
    f"rlhf.report run_name={LONG}": [f"runs/{LONG[:150]}", "File name too long"],
    "rlhf.report run_name=nope": ["path=runs/nope: no such directory"],
    "rlhf.compare path=[runs/mime]": ["path=runs/mime: no such directory. Did you mean runs/mine?"],
    "rlhf.diagnose run_name=nope": ["nope"],
    "rlhf.plan model=llama-9b": ["model=llama-9b is neither a known size nor a directory"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, a finished SFT stage without weights, an unfinished reward stage, and a torch that
    cannot be imported."""
    folder = tmp_path_factory.mktemp("user")
    final = folder / "runs/mine/sft/final"
    final.mkdir(parents=True)
    (final / "config.json").write_text("{}")
    record = dict.fromkeys(("parent", "parent_weights", "revision", "tokenizer", "template"))
    record |= {"stage": "sft", "eos_token_id": 0, "pad_token_id": 0, "seed": 1}
    (final / "rlhf.json").write_text(json.dumps(record))
    (folder / "runs/mine/reward").mkdir()
    (folder / "runs/mine/reward/metrics.jsonl").write_text("")
    rows = [{"prompt": f"Name fruit {i}.", "completion": " An apple."} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bad.jsonl").write_text("not json\n")
    (folder / "broken").mkdir()
    (folder / "broken/torch.py").write_text(TORCH)
    return folder


@pytest.fixture(scope="module")
def answers(folder):
    """What each command did where torch cannot be imported."""
    path = {"PYTHONPATH": f"{folder / 'broken'}:{sys.path[0]}", "HF_HUB_OFFLINE": "1"}
    given = [f"python -m {command}" for command in COMMANDS]
    return run_in_forks(given, ["rlhf.cli", "rlhf.inputs"], folder, **path)


@pytest.mark.parametrize("command", COMMANDS)
def test_refusal_names_all_problems_and_does_not_import_torch(command, answers):
    done = answers[f"python -m {command}"]
    assert "torch was imported" not in done.stderr
    assert "Traceback" not in done.stderr
    assert [text for text in COMMANDS[command] if text not in done.stderr] == [], done.stderr
    assert done.returncode == 2


def test_the_torch_of_these_tests_cannot_be_imported(folder):
    done = run([sys.executable, "-c", "import torch"], folder, PYTHONPATH=str(folder / "broken"))
    assert done.returncode == 1 and "torch was imported" in done.stderr


MODULES = (
    "sft reward ppo pipeline chat score evaluate generate export compare rank reward.report report "
    "diagnose plan demo"
).split()


@pytest.mark.parametrize("module", MODULES)
def test_help_answers_next_to_bad_arguments(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [module, "oops", "--help", "bad=1", "-m", "seed=high"])
    monkeypatch.setenv("COLUMNS", "20")
    try:
        runpy.run_module(f"rlhf.{module}", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        assert stop.code == 0
    shown = capsys.readouterr()
    assert f"python -m rlhf.{module}" in shown.out and shown.err == ""


@pytest.mark.parametrize("module", ["ppo", "chat"])
def test_help_ends_quietly_when_its_reader_does(module, tmp_path):
    command = f"set -o pipefail; {sys.executable} -m rlhf.{module} --help | head -1"
    done = run(["bash", "-c", command], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_ppo_without_an_evaluation_needs_no_held_out_rows(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    config.dataset.path = str(tmp_path / "one.jsonl")
    (tmp_path / "one.jsonl").write_text('{"prompt": "apple"}\n')
    config.dataset.eval_path, config.evaluation.num_prompts = None, 0
    check_inputs(config, "ppo")
    config.evaluation.num_prompts, config.dataset.eval_fraction = 4, 0.0
    with pytest.raises(InputError, match="no row to evaluate on"):
        check_inputs(config, "ppo")


# --- What is looked at, and what is not -----------------------------------------------------------


POLICY, SCORER = "runs/new/sft/final", "runs/new/reward/final"


def ppo_after_the_earlier_stages(**values) -> PPOStageConfig:
    """PPO of a run whose other stages have not ended."""
    values = {"dataset": DatasetConfig("owner/rows"), "scorer": ScorerConfig(SCORER)} | values
    return PPOStageConfig(
        run_name="new",
        model=ModelConfig(POLICY, chat_template="named_by_its_tokenizer"),
        ppo=PPOConfig(reference=POLICY),
        evaluation=EvaluationConfig(scorer=SCORER),
        **values,
    )


@pytest.mark.parametrize("path", ["owner/rows", "large.jsonl"])
def test_the_name_of_a_format_is_checked_where_only_the_stage_reads_the_rows(
    path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlhf.inputs.MOST_BYTES", 5)
    (tmp_path / "large.jsonl").write_text("not read")
    config = ppo_after_the_earlier_stages(dataset=DatasetConfig(path, format="prompts_only"))
    with pytest.raises(InputError, match="^dataset.format='prompts_only' is neither one of"):
        check_inputs(config, "ppo", ["sft", "reward"])
    config.dataset.format = "prompt_completion"
    check_inputs(config, "ppo", ["sft", "reward"])


@pytest.mark.parametrize("setting", ["path", "eval_path", "format"])
def test_a_function_for_rows_that_cannot_be_imported_is_named_by_its_setting(setting):
    value = "gone.read" if setting == "format" else "python:gone.rows"
    config = ppo_after_the_earlier_stages()
    setattr(config.dataset, setting, value)
    with pytest.raises(InputError, match=f"^dataset.{setting}='{value}' cannot be imported"):
        check_inputs(config, "ppo", ["sft", "reward"])


def test_only_what_an_earlier_stage_of_the_pipeline_makes_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def missing(config: PPOStageConfig, *earlier: str) -> list[str]:
        try:
            check_inputs(config, "ppo", earlier)
        except InputError as error:
            return [line.split("=")[0] for line in str(error).splitlines()]
        return []

    config, scorers = ppo_after_the_earlier_stages(), ["scorer.path", "evaluation.scorer"]
    assert missing(config, "sft", "reward") == []
    assert missing(config, "sft") == scorers
    assert missing(config) == ["model.path", "model.chat_template", "ppo.reference", *scorers]
    parts = [{"path": SCORER}, {"path": "runs/old/reward/final"}]
    config = ppo_after_the_earlier_stages(scorer=ScorerConfig(components=parts))
    config.ppo.reference = "runs/old/sft/final"
    assert missing(config, "sft", "reward") == ["ppo.reference", "scorer.components[1].path"]
