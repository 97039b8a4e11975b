"""Runs and commands"""

from pathlib import Path

from bad_input import Case

SFT = "rlhf.sft model.path=model dataset=prompt_completion dataset.path=rows.jsonl"


def kill_early(folder: Path) -> None:
    """Leave of a run what it writes before it trains."""
    (folder / "runs/killed/sft").mkdir(parents=True)
    config = (folder / "runs/mine/sft/config.yaml").read_text(encoding="utf-8")
    (folder / "runs/killed/sft/config.yaml").write_text(config, encoding="utf-8")


CASES = [
    Case(
        "a run directory in use",
        f"{SFT} run_name=mine",
        ("runs/mine/sft", "overwrite=true", "another run_name"),
    ),
    Case(
        "resume and overwrite together",
        f"{SFT} run_name=mine resume=true overwrite=true",
        ("resume=true", "overwrite=true", "contradict"),
    ),
    Case(
        "resuming a run that does not exist",
        "rlhf.sft resume=true run_name=mime",
        ("run_name=mime", "Did you mean mine", "resume=auto"),
    ),
    Case(
        "resuming a stage that the run does not have",
        "rlhf.ppo resume=true run_name=mine",
        ("runs/mine has no ppo stage", "without resume=true"),
    ),
    Case(
        "resuming a run that was killed before its first checkpoint",
        "rlhf.sft resume=true run_name=killed",
        ("runs/killed/sft never reached a checkpoint", "resume=auto"),
        prepare=kill_early,
    ),
    Case(
        "resuming a finished run with another setting",
        "rlhf.sft resume=true run_name=mine seed=2",
        ("seed: 1 -> 2", "another run_name"),
    ),
    Case("chat without a path", "rlhf.chat", ("path is missing",)),
    Case("chat with an unknown option", "rlhf.chat pth=model", ("'pth'", "Did you mean path")),
    Case("chat at a negative temperature", "rlhf.chat path=model temperature=-1", ("temperature",)),
    Case("export without a target", "rlhf.export path=model", ("out is missing",)),
    Case(
        "export over something else",
        "rlhf.export path=model out=broken",
        ("out=broken", "not empty"),
        prepare=lambda folder: (folder / "broken/mine.txt").write_text("mine"),
    ),
    Case(
        "export in no known dtype",
        "rlhf.export path=model out=new dtype=fp16",
        ("dtype", "float16"),
    ),
    Case(
        "scores of a file that is not there",
        "rlhf.score data=answer.jsonl path=runs/mine/reward/final",
        ("answer.jsonl",),
    ),
]
