"""A model's own Python code runs only where the command line says so, and nothing ever asks.

Run: python -m pytest tests/end_to_end/test_own_code.py
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from helpers.families import TOKENIZER
from helpers.tiny import tiny_model
from helpers.tiny_ppo import make_config, words_scorer
from peft import LoraConfig, get_peft_model
from transformers import dynamic_module_utils

from rlhf import train_ppo
from rlhf.chat import ChatOptions, talk
from rlhf.checkpoint.disk import write_manifest
from rlhf.config import InputError, ModelConfig, PPOStageConfig, save_config
from rlhf.export import ExportOptions, export
from rlhf.models import init_reward_model, load_policy, load_reward_model
from rlhf.option_parser import read_options, run_command
from rlhf.reward.report.__main__ import main as report
from rlhf.score import main as score
from rlhf.tokenizer import load_tokenizer

MODEL_CODE = """
from pathlib import Path
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
Path("ran").touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnClassifier(LlamaPreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
"""
TOKENIZER_CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path("ran").touch()

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "own_model.OwnConfig",
    "AutoModelForCausalLM": "own_model.OwnModel",
    "AutoModelForSequenceClassification": "own_model.OwnClassifier",
}


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """A working directory for the code to leave its mark in, and a person who answers yes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [str(tmp_path / "modules"), *__import__("sys").path])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def write(directory: Path, kind: str) -> Path:
    """A directory whose model, or whose tokenizer alone, comes with Python code."""
    tokenizer = TOKENIZER
    tiny_model("llama", tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if kind == "model":
        (directory / "own_model.py").write_text(MODEL_CODE)
        edit(directory / "config.json", model_type="own", auto_map=AUTO_MAP)
    else:
        (directory / "own_tokenizer.py").write_text(TOKENIZER_CODE)
        own = {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}
        edit(directory / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)
        edit(directory / "config.json", model_type="unheard_of")
    return directory


def refusal(capsys, command, options, *arguments):
    capsys.readouterr()  # of the files that the test wrote
    status = run_command("usage", options, command, list(arguments))
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert not Path("ran").exists()
    return line.removeprefix("error: ")


COMMANDS = [(export, ExportOptions, ["out=out"]), (talk, ChatOptions, [])]


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
@pytest.mark.parametrize("command, options, more", COMMANDS)
def test_commands_refuse_code_and_never_ask(command, options, more, kind, world, capsys):
    write(world / "theirs", kind)
    for given in ([], ["trust_remote_code=false"]):
        line = refusal(capsys, command, options, "path=theirs", *more, *given)
        assert line.startswith("path=theirs needs Python code of its own, which was not run")
        assert "add trust_remote_code=true to this command" in line


def test_an_adapter_on_a_model_with_code_is_refused(world, capsys):
    write(world / "theirs", "model")
    live = get_peft_model(
        tiny_model("llama", TOKENIZER), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    live.save_pretrained(world / "adapter")
    edit(world / "adapter/adapter_config.json", base_model_name_or_path="theirs")
    line = refusal(capsys, export, ExportOptions, "path=adapter", "out=out")
    assert "path=adapter needs Python code of its own" in line


def test_the_command_line_switches_it_on(world, capsys):
    write(world / "theirs", "model")
    arguments = ["path=theirs", "out=out", "trust_remote_code=true"]
    assert run_command("usage", ExportOptions, export, arguments) == 0
    assert Path("ran").exists() and Path("out/own_model.py").exists()


@pytest.mark.parametrize("load", [load_policy, load_reward_model, init_reward_model])
def test_every_loader_of_a_stage_refuses_and_names_the_override(load, world):
    config = ModelConfig(path=str(write(world / "theirs", "model")))
    rest = {load_policy: [TOKENIZER], init_reward_model: [TOKENIZER, 1]}.get(load, [])
    with pytest.raises(InputError, match="needs Python code.*add model.trust_remote_code=true"):
        load(config, *rest)
    assert not Path("ran").exists()


def test_a_head_on_an_adapter_of_a_model_with_code_is_made_without_asking(world):
    write(world / "theirs", "model")
    live = get_peft_model(
        tiny_model("llama", TOKENIZER), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    live.save_pretrained(world / "adapter")
    edit(world / "adapter/adapter_config.json", base_model_name_or_path="theirs")
    config = ModelConfig(path="adapter", trust_remote_code=True)
    model = init_reward_model(config, TOKENIZER, seed=1)
    assert type(model).__name__ == "OwnClassifier"


def test_a_tokenizer_of_a_stage_is_refused_by_its_own_name(world):
    config = ModelConfig(path="nowhere", tokenizer=str(write(world / "theirs", "tokenizer")))
    with pytest.raises(InputError, match="^model.tokenizer=.*add model.trust_remote_code=true"):
        load_tokenizer(config)
    assert not Path("ran").exists()


def test_score_and_report_refuse_code(world, capsys):
    write(world / "theirs", "model")
    Path("rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    assert score(["data=rows.jsonl", "path=theirs", "normalize=none"]) == 2
    rows = ["dataset.path=rows.jsonl", "dataset.format=ranked", "dataset.eval_fraction=0.5"]
    ranked = [{"prompt": f"p{i}", "responses": ["b", "c"], "scores": [1, 2]} for i in range(16)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    assert report(["path=theirs", *rows]) == 2
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error:")]
    assert ["path=theirs needs Python code" in error for error in errors] == [True, True]
    assert not Path("ran").exists()
    assert score(["data=x", "path=theirs", "trust_remote_code=maybe"]) == 2
    assert "trust_remote_code must be true or false" in capsys.readouterr().err


@pytest.fixture(scope="module")
def checkpoint(policy_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = train_ppo(make_config(policy_dir, folder, num_updates=3), scorer=words_scorer)
    return result.directory.parent / "checkpoint-2"


def theirs(checkpoint: Path, **values) -> PPOStageConfig:
    """A copy of a checkpoint, sealed again, whose config.yaml has other model settings."""
    from rlhf.config import load_config

    shutil.copytree(checkpoint, "theirs_checkpoint")
    copy = Path("theirs_checkpoint")
    config = load_config(PPOStageConfig, copy / "config.yaml")
    for name, value in values.items():
        setattr(config.model, name, value)
    save_config(config, copy / "config.yaml")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").unlink()
    write_manifest(copy, {k: v for k, v in manifest.items() if k not in ("seal", "files")})
    return config


def test_permission_in_somebodys_checkpoint_counts_for_nothing(checkpoint, world, capsys):
    write(world / "base", "model")
    theirs(checkpoint, path="base", trust_remote_code=True)
    line = refusal(capsys, export, ExportOptions, "path=theirs_checkpoint", "out=out")
    assert "its model.path=base needs Python code" in line
    assert "add trust_remote_code=true" in line


def test_a_function_named_in_somebodys_checkpoint_is_not_imported(checkpoint, world, capsys):
    Path("payload.py").write_text("from pathlib import Path\nPath('ran').touch()\nmake = None\n")
    theirs(checkpoint, tokenizer="python:payload.make", trust_remote_code=True)
    line = refusal(capsys, export, ExportOptions, "path=theirs_checkpoint", "out=out")
    assert "names Python code, model.tokenizer=python:payload.make, which was not run" in line
    assert "add trust_remote_code=true" in line


@pytest.mark.parametrize(
    "dataset",
    [
        "path: python:payload.rows",
        "path: a.jsonl\n  eval_path: python:payload.rows",
        "path: a.jsonl\n  format: payload.rows",
    ],
)
def test_a_report_imports_no_function_that_a_models_config_names(dataset, world, capsys):
    Path("payload.py").write_text("from pathlib import Path\nPath('ran').touch()\nrows = None\n")
    write(world / "theirs", "model")
    Path("theirs/config.yaml").write_text(f"dataset:\n  {dataset}\n")
    assert report(["path=theirs"]) == 2
    assert "theirs/config.yaml names Python code, dataset." in capsys.readouterr().err
    assert not Path("ran").exists()


@pytest.mark.parametrize("text, value", [("true", True), ("False", False)])
def test_a_yes_or_no_option_is_read_as_such(text, value):
    given = ["path=a", "out=b", f"trust_remote_code={text}"]
    assert read_options(ExportOptions, given).trust_remote_code is value


def test_another_value_of_a_yes_or_no_option_is_refused():
    with pytest.raises(InputError, match="trust_remote_code must be true or false, got 'y'"):
        read_options(ExportOptions, ["trust_remote_code=y"])
