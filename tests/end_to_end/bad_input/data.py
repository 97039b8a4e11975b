"""Data"""

from bad_input import Case
from bad_input.world import append, write_rows

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
        "a line that is not JSON, with dataset.on_bad_row=stop",
        f"{SFT} dataset=prompt_completion dataset.path=rows.jsonl dataset.on_bad_row=stop",
        ("rows.jsonl, row 25: not valid JSON", "dataset.on_bad_row=drop"),
        prepare=lambda folder: append(folder / "rows.jsonl", b'{"prompt": "Name'),
    ),
    Case(
        "a file with half of its rows lacking a field",
        f"{SFT} dataset=prompt_completion dataset.path=half.jsonl",
        ("half.jsonl, row 1, field 'completion': missing", "2 of 4 rows are malformed"),
        prepare=lambda folder: write_rows(
            folder / "half.jsonl", [{"prompt": "a"}, {"prompt": "b", "completion": "c"}] * 2
        ),
    ),
    Case(
        "rows of tool calls only",
        f"{SFT} dataset=messages dataset.path=tools.jsonl",
        ("no row to train on", "2 tool calls", "tools.jsonl, row 1"),
        prepare=lambda folder: write_rows(
            folder / "tools.jsonl", [{"messages": [{"role": "tool", "content": "sunny"}]}] * 2
        ),
    ),
    Case(
        "a file in UTF-16",
        f"{SFT} dataset=prompt_completion dataset.path=rows.jsonl",
        ("rows.jsonl", "UTF-16", "iconv"),
        prepare=lambda folder: (folder / "rows.jsonl").write_text("{}", encoding="utf-16"),
    ),
    Case(
        "lists nested too deeply in every row",
        f"{SFT} dataset=prompt_completion dataset.path=deep.jsonl",
        ("deep.jsonl, row 1: lists or objects are nested too deeply", "1 of 1 rows"),
        prepare=lambda folder: append(folder / "deep.jsonl", b'{"prompt": ' + b"[" * 9999),
    ),
    Case(
        "a single object that holds the rows",
        f"{SFT} dataset=prompt_completion dataset.path=data.json",
        ("data.json, row 1, field 'prompt': missing", "write one object per row"),
        prepare=lambda folder: write_rows(
            folder / "data.json", [{"data": [{"prompt": "a", "completion": "b"}]}]
        ),
    ),
    Case(
        "an unknown value of dataset.on_bad_row",
        f"{SFT} dataset=prompt_completion dataset.path=rows.jsonl dataset.on_bad_row=skip",
        ("dataset.on_bad_row must be one of drop, stop, got 'skip'",),
    ),
    Case(
        "a row to score that is nested too deeply",
        "rlhf.score data=deep.jsonl path=runs/mine/reward/final",
        ("data=deep.jsonl", "line 1: lists or objects are nested too deeply"),
        prepare=lambda folder: append(folder / "deep.jsonl", b'{"prompt": ' + b"[" * 9999),
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
