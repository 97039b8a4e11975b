"""examples/smollm2: its presets compose, and its command runs."""

from __future__ import annotations

import json
import sys

import pytest
from helpers.commands import ROOT, run
from helpers.tiny import tiny_model, tiny_tokenizer

from rlhf.pipeline import PipelineOptions, plan
from rlhf.tokenizer import chat_template_text

FOLDER = ROOT / "examples/smollm2"
FILES = [
    f"alpaca_eval_{kind}.jsonl" for kind in ("sft_train", "sft_test", "ranked_train", "ranked_test")
]


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_both_presets_compose(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA", "data")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr("rlhf.inputs.check_model", lambda *_: None)
    monkeypatch.setattr("rlhf.inputs.check_rows", lambda *_: None)
    recipe = [f"--config-dir={FOLDER / 'conf'}", f"recipe=smollm2_{preset}"]
    sft, reward, ppo = (step.config for step in plan(PipelineOptions(overrides=recipe)))
    assert {config.run_name for config in (sft, reward, ppo)} == {f"smollm2_{preset}"}
    assert all(config.peft.enabled for config in (sft, reward, ppo))
    assert ppo.ppo.response_length == sft.response_length == reward.normalization.response_length
    assert ppo.preflight == (preset == "gpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tpu"], "error: the preset must be cpu or gpu, got tpu"),
        ([], "error: DATA=nowhere has no alpaca_eval_sft_train.jsonl; give the folder of the four"),
    ],
)
def test_a_wrong_word_or_folder_is_refused_before_anything_starts(arguments, message, tmp_path):
    result = run(["bash", str(FOLDER / "run.sh"), *arguments], tmp_path, DATA="nowhere")
    assert result.returncode == 2 and result.stderr.startswith(message) and not result.stdout


@pytest.mark.slow
def test_the_command_runs_and_goes_on(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template_text("plain")
    sizes = {"max_position_embeddings": 512, "num_hidden_layers": 30}  # as SmolLM2 has
    model = tiny_model("llama", tokenizer, **sizes)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for number, name in enumerate(FILES):
        rows = []
        for row in range(8):
            asked = f"Say {number} and {row}."
            demonstration = {"instruction": asked, "input": "", "output": "Yes."}
            ranked = {"prompt": asked, "responses": ["Yes.", "No no."], "scores": [0.9, 0.1]}
            rows.append(ranked if "ranked" in name else demonstration)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = "sft.trainer.max_steps=2 sft.response_length=8 ppo.num_updates=1 ppo.batch_size=4 "
    small += "ppo.num_mini_batches=1 ppo.response_length=8 normalization.response_length=8"
    command = ["bash", str(FOLDER / "run.sh"), "cpu", *small.split()]
    variables = {"DATA": str(tmp_path), "MODEL": str(tmp_path / "model"), "PYTHON": sys.executable}
    result = run(command, tmp_path, 1200, **variables, RUNS=str(tmp_path / "runs"))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    folder = tmp_path / "runs/smollm2_cpu"
    assert (folder / "report.html").is_file() and "win rate of b" in result.stdout.lower()
    assert len((folder / "after.jsonl").read_text().splitlines()) == 8
    again = run(command, tmp_path, 1200, **variables, RUNS=str(tmp_path / "runs"))
    assert again.returncode == 0 and "ppo is finished: nothing to do" in again.stdout
