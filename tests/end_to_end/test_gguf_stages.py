"""All stages with LoRA on a real chat model that is a GGUF file, as a user types them.

Run: python -m pytest -m slow tests/end_to_end/test_gguf_stages.py
"""

from __future__ import annotations

import json
import sys

import pytest
from helpers.commands import check_runs
from helpers.smollm2 import find_smollm2

from rlhf.checkpoint import hash_weights, read_record

SMALL = "peft=lora dataset.max_length=96 run_name=mine"
# small rates: the model must still know what it knew
TRAINER = "trainer.max_steps=2 trainer.per_device_train_batch_size=2 trainer.learning_rate=1e-6"


@pytest.mark.slow
def test_the_stages_train_smollm2_from_its_gguf_file(tmp_path):
    (tmp_path / "model.gguf").symlink_to(find_smollm2(tmp_path))
    rows = [
        {"prompt": f"What is {i} + {i}?", "chosen": f"It is {i + i}.", "rejected": "No idea."}
        for i in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in (
        f"rlhf.sft model.path=model.gguf dataset.path=rows.jsonl num_samples=1 response_length=8 "
        f"dataset.as_conversation=true {SMALL} {TRAINER}",
        f"rlhf.reward dataset.path=rows.jsonl normalization.response_length=8 {SMALL} {TRAINER}",
        f"rlhf.ppo dataset.path=rows.jsonl preflight=false evaluation.num_prompts=1 {SMALL} "
        "ppo.num_updates=1 ppo.batch_size=4 ppo.num_ppo_epochs=1 ppo.response_length=8 "
        "ppo.learning_rate=1e-6",
    ):
        check_runs(f"{sys.executable} -m {command}", tmp_path, timeout=1800)
    record = read_record(tmp_path / "runs/mine/sft/final")
    assert record is not None and record.parent_weights == hash_weights(tmp_path / "model.gguf")
    (tmp_path / "questions.txt").write_text("What is the capital of France?\n")
    check_runs(
        f"{sys.executable} -m rlhf.generate path=runs/mine/ppo/final prompts=questions.txt "
        "out=answers.jsonl temperature=0 response_length=16",
        tmp_path,
        timeout=600,
    )
    assert "Paris" in (tmp_path / "answers.jsonl").read_text()
