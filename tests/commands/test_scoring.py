"""Scoring a file: `python -m rlhf.score path=runs/mine/reward/final data=answers.jsonl`.

Run: python -m pytest tests/commands/test_scoring.py
"""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.endpoints import Answers, running
from helpers.rows import rows_of
from helpers.scorers import MEAN, raw_scores, rendered, write_reward_model
from helpers.tiny import tiny_tokenizer

import rlhf.row_file
from rlhf.config import InputError
from rlhf.option_parser import read_options
from rlhf.score import ScoreOptions, main, read_rows
from rlhf.tokenizer import chat_template_text

ROOT = Path(__file__).resolve().parents[2]
WORDS = "dog cat horse red blue an apple is a fruit".split()


def our_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template_text("plain")
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_reward_model(tmp_path_factory.mktemp("model"), our_tokenizer(), seed=1)


def write(path: Path, rows) -> Path:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def many_rows(number: int) -> list[dict]:
    """Rows with one to three responses of different lengths."""
    rows = []
    for i in range(number):
        answers = [" ".join(WORDS[j : j + 1 + (i + j) % 6]) + f" {i}" for j in range(1 + i % 3)]
        rows.append({"prompt": f"name {i} things", "responses": answers, "id": i})
    return rows


def expected_scores(model, prompts, responses):
    return raw_scores(model, rendered(our_tokenizer(), prompts, responses)) - MEAN


def test_every_kind_of_row_gets_its_score_and_keeps_its_fields(model, tmp_path, capsys):
    question = [{"role": "user", "content": "name a fruit"}]
    rows = [
        {"prompt": "name a fruit: ", "response": "an apple\u2028.", "id": 7, "note": None},
        {"prompt": question, "responses": ["an apple .", "", "dog\r\n."], "best": 0.5},
        {"messages": [*question, {"role": "assistant", "content": "a pear ."}], "source": "é"},
        {"prompt": question, "response": "dog .", "responses": None},
    ]
    file = write(tmp_path / "answers.jsonl", rows)
    file.write_text(file.read_text().replace("\n", "\n\n", 1))  # an empty line is no row
    assert main([f"data={file}", f"path={model}"]) == 0
    written = rows_of(tmp_path / "answers.scored.jsonl")
    prompts = ["name a fruit: ", *[question] * 5]
    texts = ["an apple\u2028.", "an apple .", "", "dog\r\n.", "a pear .", "dog ."]
    scores = expected_scores(model, prompts, texts)
    found = [written[0]["score"], *written[1]["scores"], written[2]["score"], written[3]["score"]]
    torch.testing.assert_close(torch.tensor(found), scores, rtol=1e-5, atol=1e-5)
    for row, result in zip(rows, written, strict=True):
        new = {"scores"} if isinstance(row.get("responses"), list) else {"score"}
        assert {k: v for k, v in result.items() if k not in new} == row
        assert result.keys() - row.keys() == new
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["responses", "mean", "std", "min", "max"]
    figures = [scores.mean(), scores.std(unbiased=False), scores.min(), scores.max()]
    assert [float(x) for x in lines[2].split()] == pytest.approx(
        [6, *map(float, figures)], rel=1e-3
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "answers.scored.jsonl"]


def test_normalisation_and_output_file_can_be_chosen(model, tmp_path):
    file = write(tmp_path / "answers.jsonl", [{"prompt": "a", "response": "an apple"}])
    out = tmp_path / "raw.jsonl"
    arguments = [f"data={file}", f"path={model}", f"out={out}", "normalize=none", "batch_size=1"]
    assert main(arguments) == 0
    expected = expected_scores(model, ["a"], ["an apple"]) + MEAN
    assert rows_of(out)[0]["score"] == pytest.approx(float(expected[0]), rel=1e-4)


# --- Continuing -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(model, tmp_path_factory):
    """A command that was stopped just before its end: its arguments, and what it left."""
    folder = tmp_path_factory.mktemp("begun")
    file = write(folder / "answers.jsonl", many_rows(40))
    arguments = [f"data={file}", f"path={model}", "batch_size=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf.row_file.os, "replace", interrupt)
        assert main(arguments) == 130
    assert not (folder / "answers.scored.jsonl").exists()
    return arguments, folder


def interrupt(*_):
    raise KeyboardInterrupt


def copy_of(begun, folder: Path, num_bytes: int | None = None) -> list[str]:
    """Copy a stopped command's files, the partial one cut short; return the arguments."""
    arguments, source = begun
    for file in source.iterdir():
        data = file.read_bytes()
        (folder / file.name).write_bytes(data[:num_bytes] if file.suffix == ".partial" else data)
    return [a.replace(str(source), str(folder)) for a in arguments]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.77, 0.999, 1.0])
def test_a_file_cut_at_any_byte_is_continued_to_the_same_end(begun, tmp_path, share, capsys):
    whole = (begun[1] / "answers.scored.jsonl.partial").read_bytes()
    cut = int(share * len(whole))
    arguments = copy_of(begun, tmp_path, cut)
    done = whole[:cut].count(b"\n")
    assert main(arguments) == 0
    assert (tmp_path / "answers.scored.jsonl").read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 2
    said = capsys.readouterr().out
    assert (f"after {done} of 40 rows" in said) == (done > 0)
    scores = torch.tensor([s for line in whole.splitlines() for s in json.loads(line)["scores"]])
    assert f"{float(scores.mean()):.4g}" in said and str(len(scores)) in said


KILLED_AT_100 = """
import os, runpy, signal
from tqdm import tqdm

update = tqdm.update

def killed(bar, number):
    if bar.n == 100:
        os.kill(os.getpid(), signal.SIGKILL)
    update(bar, number)

tqdm.update = killed
runpy.run_module("rlhf.score", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_killed_command_continues_to_the_same_end(model, tmp_path, capsys):
    file = write(tmp_path / "answers.jsonl", many_rows(200))
    arguments = [f"data={file}", f"path={model}", "batch_size=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED_AT_100, *arguments]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    partial = tmp_path / "answers.scored.jsonl.partial"
    assert 0 < partial.read_bytes().count(b"\n") < 200
    assert main(arguments) == 0 and "continuing" in capsys.readouterr().out
    again = tmp_path / "again.jsonl"
    assert main([*arguments, f"out={again}"]) == 0
    assert (tmp_path / "answers.scored.jsonl").read_bytes() == again.read_bytes()


def test_the_folder_of_the_output_is_made(model, tmp_path, capsys):
    file = write(tmp_path / "answers.jsonl", many_rows(2))
    assert main([f"data={file}", f"path={model}", f"out={tmp_path}/new/deep/x.jsonl"]) == 0
    assert len(rows_of(tmp_path / "new/deep/x.jsonl")) == 2
    assert main([f"data={file}", f"path={model}", f"out={file}/x.jsonl"]) == 2
    assert f"{file} is not a directory" in capsys.readouterr().err


def test_a_finished_output_is_not_overwritten(model, tmp_path, capsys):
    file = write(tmp_path / "answers.jsonl", many_rows(2))
    out = tmp_path / "answers.scored.jsonl"
    out.write_text("mine")
    assert main([f"data={file}", f"path={model}"]) == 2
    assert f"out={out} exists already; delete it, or give another out=" in capsys.readouterr().err
    assert out.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_what_was_begun_with_something_else_is_not_continued(begun, model, tmp_path, capsys):
    arguments = copy_of(begun, tmp_path, 1000)
    before = (tmp_path / "answers.scored.jsonl.partial").read_bytes()
    assert main([a.replace("batch_size=2", "normalize=none") for a in arguments]) == 2
    errors = capsys.readouterr().err
    assert "begun with other values" in errors
    assert "normalize: demo_mean_zero -> none" in errors and "batch_size: 2 -> 32" in errors
    other = write_reward_model(tmp_path / "other", our_tokenizer(), seed=2)
    assert main([a.replace(model, other) for a in arguments]) == 2
    assert "sha256 of the weights: " in capsys.readouterr().err
    rows = tmp_path / "answers.jsonl"
    rows.write_bytes(rows.read_bytes() + b'{"prompt": "one", "response": "more"}\n')
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert "rows: 40 -> 41" in errors and "sha256 of the rows: " in errors
    assert (tmp_path / "answers.scored.jsonl.partial").read_bytes() == before


@pytest.mark.parametrize("damage", ["identity", "rows"])
def test_what_was_begun_and_is_damaged_is_not_continued(begun, tmp_path, capsys, damage):
    arguments = copy_of(begun, tmp_path, 1000)
    partial = tmp_path / "answers.scored.jsonl.partial"
    if damage == "identity":
        partial.with_name(partial.name + ".json").unlink()
    else:
        partial.write_bytes(b"\0" * 99 + b"\n" + partial.read_bytes())
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "cannot be continued" in error and f"delete {partial} to start afresh" in error


# --- What is refused ------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
BAD_ROWS = [
    ('{"prompt": "x"}', "expected `prompt` and `response`, .*; the row has prompt"),
    ('{"prompt": "x", "response": "y", "responses": ["y"]}', "has prompt, response, responses"),
    ('{"response": "y"}', "the row has response"),
    ('{"prompt": null, "response": "y"}', "the row has response"),
    ("{}", "the row has no fields"),
    (json.dumps({"messages": [USER, ANSWER], "prompt": "x"}), "the row has messages, prompt"),
    (json.dumps({"messages": [USER]}), "the last of `messages` must be the assistant's"),
    (json.dumps({"messages": [ANSWER]}), "does not start with a user turn"),
    (json.dumps({"messages": [ANSWER, ANSWER]}), "does not start with a user turn"),
    (json.dumps({"prompt": [ANSWER], "response": "y"}), "does not start with a user turn"),
    (json.dumps({"messages": [{"role": "usr"}, ANSWER]}), r"'messages\[0\].role': got 'usr'"),
    (json.dumps({"prompt": [{"role": "user"}], "response": "y"}), "field 'prompt.0..content'"),
    ('{"prompt": 3, "response": "y"}', "field 'prompt': got 3"),
    ('{"prompt": "x", "response": ["y"]}', r"field 'response': got \['y'\]; expected text"),
    ('{"prompt": "x", "responses": "y"}', "field 'responses': got 'y'; expected some texts"),
    ('{"prompt": "x", "responses": ["y", 3]}', r"field 'responses\[1\]': got 3; expected text"),
    ('{"prompt": "x", "responses": []}', r"field 'responses': got \[\]; expected some texts"),
    ('{"prompt": "x", "response": "y", "score": 1}', "the row has a field 'score' already"),
    ('["x", "y"]', r"got \['x', 'y'\]; expected an object"),
    ('{"prompt": ' + "[" * 99_999 + "]" * 99_999 + "}", "lists or objects are nested too deeply"),
    ('{"prompt": ' + "9" * 5000 + "}", "Exceeds the limit .* for integer string conversion"),
    (
        json.dumps({"messages": [USER, {"role": "tool"}, ANSWER]}),
        "tool calls, which a reward model",
    ),
    ("{oops", r"not valid JSON \(.*column 2\); expected one object per line"),
    ('{"prompt": "\\ud800", "response": "y"}', "not Unicode text"),
    ('{"prompt": "' + "x" * 200 + '", "response": "y"}', r"20\d tokens, but the context of .* 128"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=lambda x: str(x)[:40])
def test_a_bad_row_is_named_by_its_line_and_nothing_is_written(
    model, tmp_path, capsys, row, message
):
    good = '{"prompt": "x", "response": "y"}'
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join([good, "", row, good]) + "\n")
    assert main([f"data={file}", f"path={model}"]) == 2
    assert list(tmp_path.iterdir()) == [file]
    errors = capsys.readouterr().err
    assert re.search(rf"nothing was scored:\n  line 3: .*{message}", errors), errors


def test_a_template_that_refuses_a_row_names_its_line(tmp_path, capsys):
    from rlhf.demo.world import build_tokenizer

    model = write_reward_model(tmp_path / "model", build_tokenizer(), seed=1)
    system = {"role": "system", "content": "be brief"}
    rows = [{"prompt": prompt, "response": "y"} for prompt in ([USER], [system, USER])]
    file = write(tmp_path / "answers.jsonl", rows)
    assert main([f"data={file}", f"path={model}"]) == 2
    assert "line 2: the chat template refuses a conversation" in capsys.readouterr().err
    assert not (tmp_path / "answers.scored.jsonl.partial").exists()


def test_many_bad_rows_are_counted(model, tmp_path, capsys):
    file = write(tmp_path / "answers.jsonl", [{"prompt": "x"}] * 25)
    assert main([f"data={file}", f"path={model}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:-1]] == [
        f"line {i}" for i in range(1, 11)
    ]
    assert lines[-1].strip() == "... and 15 more"


@pytest.mark.parametrize("data", [None, b"", b"\n\n", b"\xff\xfe"])
def test_a_file_without_rows_is_refused(model, tmp_path, capsys, data):
    file = tmp_path / "answers.jsonl"
    if data is not None:
        file.write_bytes(data)
    assert main([f"data={file}", f"path={model}"]) == 2
    assert f"data={file}" in capsys.readouterr().err
    assert not (tmp_path / "answers.scored.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=a", "path=b", "pth=c"], "unknown option 'pth'. Did you mean path"),
        (["data=a"], "path is missing; add path=<final/ of a reward stage"),
        (["data=a", "path=b", "normalize=x"], "normalize must be one of demo_mean_zero, sta"),
        (["data=a", "path=b", "dtype=fp16"], "dtype must be one of auto, float32, bfloat16"),
        (["data=a", "path=b", "batch_size=0"], "batch_size must be >= 1, got 0"),
        (["data=a", "path=b", "batch_size=x"], "batch_size must be of type int, got 'x'"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(arguments, message):
    with pytest.raises(InputError) as caught:
        read_options(ScoreOptions, arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data is missing; add data=<rows to score>, or serve=127.0.0.1:8123"),
        (["data=a.jsonl", "serve=127.0.0.1:0"], "give data=<rows> or serve=<address>, not both"),
        (["serve=8123"], "serve=8123 is no address; give serve=127.0.0.1:8123"),
        (["data=a.jsonl", "path=http://127.0.0.1:1/x"], "path=http://127.0.0.1:1/x cannot be rea"),
    ],
)
def test_a_scorer_is_served_or_scores_a_file(model, capsys, arguments, message):
    assert main([f"path={model}", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_python_scorer_gets_the_columns_of_the_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "def exact(completions, answer):\n    return map(str.count, completions, answer)\n"
    (tmp_path / "known_answers.py").write_text(code)
    rows = [
        {"prompt": "a", "response": "5 or 5", "answer": "5"},
        {"prompt": "b", "responses": ["4", "44"], "answer": "4", "id": 1},
    ]
    file = write(tmp_path / "answers.jsonl", rows)
    assert main([f"data={file}", "path=known_answers.exact"]) == 0
    assert capsys.readouterr().out.endswith("scores by known_answers.exact\n")
    first, second = rows_of(tmp_path / "answers.scored.jsonl")
    assert first["score"] == 2.0 and second["scores"] == [1.0, 2.0]


def test_a_wrong_model_or_folder_is_named(model, tmp_path, capsys):
    file = write(tmp_path / "answers.jsonl", many_rows(2))
    for arguments, message in (
        ([f"path={tmp_path}/no/model"], "path=.*no/model: no such directory"),
        ([f"path={tmp_path}/no/model", "normalize=none"], "path=.*no/model: no such directory"),
        ([f"path={Path(model).parents[1] / 'base'}", "normalize=none"], "is not a reward model"),
        ([f"path={Path(model).parents[1]}"], "is not a model directory .*did you mean .*final"),
    ):
        assert main([f"data={file}", *arguments]) == 2
        assert re.search(message, capsys.readouterr().err), message
    assert list(tmp_path.iterdir()) == [file]


def run_python(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_help_of_the_stage_names_the_command(tmp_path):
    result = run_python("rlhf.reward", "--help", folder=tmp_path)
    assert "python -m rlhf.score path=runs/mine/reward/final data=answers.jsonl" in result.stdout


@pytest.mark.slow
def test_the_old_spelling_works_and_names_the_new_one(model, tmp_path):
    write(tmp_path / "my answers.jsonl", many_rows(2))
    arguments = ["score=my answers.jsonl", f"path={model}"]
    result = run_python("rlhf.reward", *arguments, folder=tmp_path)
    assert result.returncode == 0 and (tmp_path / "my answers.scored.jsonl").is_file()
    new = f"this command is now: python -m rlhf.score 'data=my answers.jsonl' path={model}"
    assert result.stderr.splitlines().count(new) == 1


def test_a_gzip_file_is_refused_with_the_command_that_unpacks_it(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a", "response": "b"}\n'))
    with pytest.raises(InputError, match=f"is a gzip file; unpack it: gunzip -k {path}"):
        read_rows(path)


def test_an_error_in_the_middle_has_a_line_of_its_own(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Hi", "response": "Ho"}\n')
    with running(Answers((503, {"error": "busy"}))) as server:
        more = ["retries=1", f"out={tmp_path}/out.jsonl"]
        assert main([f"path={server.url}", f"data={tmp_path}/a.jsonl", *more]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:6] for line in lines if "busy" in line] == ["warnin", "error:"]
