"""Runs and commands"""

from bad_input import Case

SFT = "rlhf.sft model.path=model dataset=prompt_completion dataset.path=rows.jsonl"

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
        "rlhf.reward score=answer.jsonl path=runs/mine/reward/final",
        ("answer.jsonl",),
    ),
]
