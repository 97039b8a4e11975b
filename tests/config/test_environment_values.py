"""Values from the environment, such as tokens, are used but never written out.

Run: python -m pytest tests/config/test_environment_values.py
"""

import json
import runpy

import pytest
from helpers.tiny import tiny_model, tiny_tokenizer

from rlhf.config import InputError, SFTStageConfig, load_config
from rlhf.metrics import read_jsonl

SECRET = "hf_sEcReT0123456789"


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Run a stage's command in this process: (exit status, all that was printed)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("MY_SECRET", SECRET)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tiny_model("llama", tiny_tokenizer()).save_pretrained(tmp_path / SECRET / "model")
    tiny_tokenizer().save_pretrained(tmp_path / SECRET / "model")
    rows = [{"prompt": f"Fruit {i}?", "completion": f" Apple {i}."} for i in range(24)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / SECRET / "rows.jsonl").write_text(text)

    def run(module, *arguments):
        monkeypatch.setattr("sys.argv", [module, *arguments])
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        printed = capfd.readouterr()
        return status, printed.out + printed.err

    return run


ARGUMENTS = (
    "model.path=${oc.env:MY_SECRET}/model",
    "dataset.path=${oc.env:MY_SECRET}/rows.jsonl",
    "dataset.eval_path=${dataset.path}",
    "dataset=prompt_completion",
    "dataset.eval_split=train",
    "dataset.max_length=64",
    "run_name=mine",
    "num_samples=1",
    "response_length=4",
    "trainer.per_device_train_batch_size=4",
    "checkpoint.every=2",
)


def written(folder):
    """Every file of a run in which the secret is found."""
    return [f for f in folder.rglob("*") if f.is_file() and SECRET.encode() in f.read_bytes()]


def test_no_file_and_no_message_holds_a_value_from_the_environment(command, tmp_path):
    more = ("tracker=wandb", "tracker.mode=offline", "trainer.max_steps=4")
    status, printed = command("rlhf.sft", *ARGUMENTS, *more)
    assert status == 0, printed
    assert SECRET not in printed
    assert written(tmp_path / "runs") == []
    text = (tmp_path / "runs/mine/sft/final/config.yaml").read_text()
    assert "path: ${oc.env:MY_SECRET}/model" in text
    assert "path: ${oc.env:MY_SECRET}/rows.jsonl" in text
    record = json.loads((tmp_path / "runs/mine/sft/final/rlhf.json").read_text())
    assert record["parent"] == "${oc.env:MY_SECRET}/model"


def test_an_error_names_the_variable_and_not_its_value(command):
    arguments = [a.replace("/rows.jsonl", "/missing.jsonl") for a in ARGUMENTS]
    status, printed = command("rlhf.sft", *arguments)
    assert status == 2
    assert "dataset.path='${oc.env:MY_SECRET}/missing.jsonl'" in printed
    assert SECRET not in printed


def test_a_resumed_run_takes_the_value_again(command, tmp_path, monkeypatch):
    status, printed = command("rlhf.sft", *ARGUMENTS, "trainer.max_steps=4")
    assert status == 0, printed
    directory = tmp_path / "runs/mine/sft"
    (directory / "final").rename(tmp_path / "finished")
    (tmp_path / SECRET).rename(tmp_path / "hf_another_value")
    monkeypatch.setenv("MY_SECRET", "hf_another_value")
    status, printed = command("rlhf.sft", "run_name=mine", "resume=true")
    assert status == 0, printed
    assert "resuming from" in printed
    assert (directory / "final/model.safetensors").is_file()
    assert max(row["step"] for row in read_jsonl(directory / "metrics.jsonl")) == 4


def test_somebody_elses_configuration_is_not_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", SECRET)
    file = tmp_path / "config.yaml"
    file.write_text("model:\n  path: ${oc.env:MY_SECRET}/model\nrun_name: a\n")
    config = load_config(SFTStageConfig, file)
    assert config.model.path == "${oc.env:MY_SECRET}/model"


def test_a_damaged_configuration_is_one_line(tmp_path):
    file = tmp_path / "config.yaml"
    for content in (b"\xff\xfe\x00", b"a: [1"):
        file.write_bytes(content)
        with pytest.raises(InputError, match="config.yaml is damaged"):
            load_config(SFTStageConfig, file)
