"""Directories of other people"""

import re
from pathlib import Path

from bad_input import Case
from bad_input.world import edit_json

SPLIT = "dataset.eval_fraction=0.3 dataset.max_length=64"
SFT = f"rlhf.sft dataset=prompt_completion dataset.path=rows.jsonl run_name=new {SPLIT}"


def need_code(folder: Path) -> None:
    """Make model/ one that cannot be loaded without a Python file of its own."""
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit_json(folder / "model/config.json", model_type="own", auto_map=classes)
    (folder / "model/own.py").write_text("raise SystemExit('it ran')")


def name_code(folder: Path) -> None:
    """Have the reward model's own configuration name a function as its data."""
    config = folder / "runs/mine/reward/final/config.yaml"
    text = config.read_text(encoding="utf-8")
    text = re.sub(r"path: .*ranked\.jsonl", "path: python:os.rows", text)
    config.write_text(text, encoding="utf-8")


CASES = [
    Case(
        "a model that needs code of its own",
        f"{SFT} model.path=model",
        ("model.path=model", "was not run", "model.trust_remote_code=true"),
        prepare=need_code,
    ),
    Case(
        "exporting a model that needs code of its own",
        "rlhf.export path=model out=out",
        ("path=model", "was not run", "add trust_remote_code=true"),
        prepare=need_code,
    ),
    Case(
        "talking to a model that needs code of its own",
        "rlhf.chat path=model trust_remote_code=false",
        ("path=model", "was not run", "add trust_remote_code=true"),
        prepare=need_code,
    ),
    Case(
        "a yes-or-no option with another value",
        "rlhf.export path=model out=out trust_remote_code=y",
        ("trust_remote_code", "true or false", "'y'"),
    ),
    Case(
        "a report on a reward model whose config.yaml names a function",
        "rlhf.reward.report path=runs/mine/reward/final",
        ("dataset.path=python:os.rows", "was not run", "trust_remote_code=true"),
        prepare=name_code,
    ),
    Case(
        "talking to the folder of all runs",
        "rlhf.chat path=runs",
        ("path=runs", "did you mean", "runs/mine/sft/final"),
    ),
]
