"""Data"""

from bad_input import Case
from bad_input.world import write_rows

SFT = "rlhf.sft model.path=model run_name=new dataset.max_length=64 dataset.eval_fraction=0.3"
REWARD = "rlhf.reward run_name=mine overwrite=true dataset.max_length=64"

CASES = [
    Case(
        "a file that is not there",
        f"{SFT} dataset=prompt_completion dataset.path=row.jsonl",
        ("dataset.path='row.jsonl'", "neither a file nor a directory"),
    ),
    Case(
        "a file of an unknown kind",
        f"{SFT} dataset=prompt_completion dataset.path=rows.txt",
        ("rows.txt", ".jsonl"),
        prepare=lambda folder: (folder / "rows.jsonl").rename(folder / "rows.txt"),
    ),
    Case(
        "an empty file",
        f"{SFT} dataset=prompt_completion dataset.path=empty.jsonl",
        ("empty.jsonl", "no rows"),
        prepare=lambda folder: (folder / "empty.jsonl").touch(),
    ),
    Case(
        "a format that does not fit the rows",
        f"{SFT} dataset=alpaca dataset.path=rows.jsonl",
        ("rows.jsonl", "row 1", "'output'", "the row has prompt, completion", "alpaca"),
    ),
    Case(
        "a length that leaves no row",
        f"{SFT} dataset=prompt_completion dataset.path=rows.jsonl dataset.max_length=2",
        ("dataset.max_length=2", "raise it"),
    ),
    Case(
        "a length beyond the model's context",
        f"{SFT} dataset=prompt_completion dataset.path=rows.jsonl dataset.max_length=4096",
        ("dataset.max_length=4096", "128"),
    ),
    Case(
        "one response per prompt in ranked rows",
        f"{REWARD} dataset=ranked dataset.path=one.jsonl",
        ("one.jsonl", "only one response"),
        prepare=lambda folder: write_rows(
            folder / "one.jsonl", [{"prompt": "a", "responses": ["b"], "ranks": [0]}] * 8
        ),
    ),
]
