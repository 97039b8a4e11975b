"""What is written and shown: names, `metrics.jsonl`, `timings.jsonl`, tables, trackers.

Run: python -m pytest tests/test_metrics.py
"""

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from helpers.configs import valid_config

from rlhf.config import InputError, SFTStageConfig, TrackerConfig, check
from rlhf.config.knobs.shared import TRACKERS
from rlhf.console import say, table, warn
from rlhf.metrics import (
    METRICS,
    TIMINGS,
    MetricsWriter,
    StageResult,
    append_jsonl,
    cut_jsonl,
    read_jsonl,
)
from rlhf.trackers import Trackers, wandb_options

ROOT = Path(__file__).resolve().parents[1]


def writer_in(directory):
    return MetricsWriter(directory, SFTStageConfig(), "sft")


def test_each_step_is_one_row_with_the_step_first(tmp_path):
    writer = writer_in(tmp_path)
    writer.write(1, {"loss": 0.5, "num_tokens": 12})
    writer.write(2, {"loss": 0.25, "step": 99})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": 0.5, "num_tokens": 12}\n{"step": 2, "loss": 0.25}\n'
    )


def test_evaluation_joins_the_row_of_its_step_and_can_be_taken_back(tmp_path):
    file = tmp_path / "metrics.jsonl"
    writer = writer_in(tmp_path)
    writer.write(1, {"loss": 0.5, "epoch": 0.1})
    size = file.stat().st_size
    writer.write(1, {"eval_loss": 0.25, "epoch": 0.1})
    writer.close()
    writer = writer_in(tmp_path)  # a run that continues
    writer.write(1, {"eval_entropy": math.nan})
    writer.write(2, {"loss": 0.125})
    whole = {"step": 1, "loss": 0.5, "epoch": 0.1, "eval_loss": 0.25, "eval_entropy": None}
    assert read_jsonl(file) == [whole, {"step": 2, "loss": 0.125}]
    cut_jsonl(file, size)  # a checkpoint was written between the row and its evaluation
    assert file.read_text() == '{"step": 1, "loss": 0.5, "epoch": 0.1}\n'


def test_unknown_metric_is_refused_and_nothing_is_written(tmp_path):
    writer = writer_in(tmp_path)
    with pytest.raises(KeyError, match="metrics without an entry in METRICS: \\['los'\\]"):
        writer.write(1, {"loss": 0.5, "los": 0.5})
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_json_lacks_becomes_null(value, tmp_path):
    writer_in(tmp_path).write(1, {"loss": value})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None}]


def test_every_metric_has_a_meaning():
    assert all(len(meaning) > 10 for meaning in METRICS.values())


def test_what_the_clock_says_stands_in_a_file_of_its_own(tmp_path):
    writer = writer_in(tmp_path)
    writer.write(1, {"loss": 0.5, "seconds": 1.5, "kl": 0.25, "collect_seconds": 0.75})
    writer.write(2, {"seconds": 2.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5, "kl": 0.25}\n'
    assert (tmp_path / "timings.jsonl").read_text() == (
        '{"step": 1, "seconds": 1.5, "collect_seconds": 0.75}\n{"step": 2, "seconds": 2.5}\n'
    )


def test_every_timing_is_a_metric():
    assert TIMINGS <= METRICS.keys()
    assert {name for name in METRICS if name.endswith("second") or "seconds" in name} == TIMINGS


def test_line_separators_inside_a_response_do_not_end_a_row(tmp_path):
    path = tmp_path / "samples.jsonl"
    samples = [{"step": step, "response": "a\u2028b\u0085c\x0bd\r\ne\ff"} for step in (1, 2, 3)]
    append_jsonl(path, samples)
    assert read_jsonl(path) == samples
    assert read_jsonl(tmp_path / "none.jsonl") == []


# --- Ranks ----------------------------------------------------------------------------------------


def test_other_ranks_write_and_print_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    config = SFTStageConfig(tracker=TrackerConfig(names=["wandb"], mode="offline"))
    writer = MetricsWriter(tmp_path, config, "sft")
    writer.write(1, {"loss": 0.5})
    writer.write_samples(1, tmp_path / "samples.jsonl", [{"step": 1, "response": "x"}])
    writer.close()
    say("text")
    warn("text")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    with pytest.raises(KeyError):
        writer.write(1, {"los": 0.5})


def test_warning_goes_to_stderr(capsys):
    say("one")
    warn("two")
    assert capsys.readouterr() == ("one\n", "warning: two\n")


# --- Table ----------------------------------------------------------------------------------------


def test_table_puts_numbers_right_and_text_left():
    lines = table(
        [("accuracy", 0.123456, 7), ("kl", None, 12345), ("score", 123456.7, 1)],
        ("metric", "value", "n"),
    )
    assert lines.splitlines() == [
        "metric     value      n",
        "--------  ------  -----",
        "accuracy  0.1235      7",
        "kl             -  12345",
        "score     123457      1",
    ]


def test_table_without_rows_shows_its_header():
    assert table([], ("a", "long")) == "a  long\n-  ----"


def test_table_shows_numbers_that_are_not_finite():
    lines = table([(math.nan, -math.inf)], ("a", "b")).splitlines()
    assert lines[-1].split() == ["nan", "-inf"]


# --- Weights & Biases -----------------------------------------------------------------------------


def test_wandb_offline_run_is_written_and_continued_under_the_id_of_the_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the tracker's test needs `pip install wandb`")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = SFTStageConfig(tracker=TrackerConfig(names=["wandb"], mode="offline"))

    run_id = "0123456789abcdef"
    writer = MetricsWriter(tmp_path, config, "sft", run_id)
    writer.write(1, {"loss": 0.5})
    samples = [{"step": 1, "prompt": [{"role": "user", "content": "Hi"}], "response": "Hello"}]
    writer.write_samples(1, tmp_path / "samples.jsonl", samples)
    writer.close()
    assert read_jsonl(tmp_path / "samples.jsonl") == samples

    resumed = MetricsWriter(tmp_path, config, "sft", run_id)
    resumed.write(2, {"loss": 0.25})
    resumed.close()
    # two within one second: the second folder ends with -1
    runs = [p.name.removesuffix("-1") for p in (tmp_path / "wandb").glob("offline-run-*")]
    assert {name.split("-")[-1] for name in runs} == {run_id} and len(runs) == 2
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_tracker_that_is_not_installed_is_named_before_anything_loads(monkeypatch):
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    config = valid_config("sft", {"tracker.names": ["comet_ml"]})
    with pytest.raises(InputError, match="comet_ml is not installed: pip install comet-ml"):
        check(config)


# --- Other trackers -------------------------------------------------------------------------------


def test_trackers_are_those_of_accelerate():
    assert sorted(LOGGER_TYPE_TO_CLASS) == sorted(TRACKERS)


def scalars(directory):
    """Name -> (step, value) pairs of the events that TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, round(e.value, 3)) for e in events.Scalars(name)] for name in names}


def test_tensorboard_shows_each_step_once_after_a_stop(tmp_path):
    pytest.importorskip("tensorboard", reason="the tracker's test needs `pip install tensorboard`")
    config = SFTStageConfig(tracker=TrackerConfig(names=["tensorboard"]))
    writer = MetricsWriter(tmp_path, config, "sft")
    for step, loss in ((1, 0.5), (2, 0.25), (3, math.nan)):
        writer.write(step, {"loss": loss})
    writer.close()
    first = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (tmp_path / "metrics.jsonl").write_text(first)  # as resuming from a checkpoint of step 1 does
    resumed = MetricsWriter(tmp_path, config, "sft")
    resumed.write(2, {"loss": 0.125})
    resumed.close()
    assert scalars(tmp_path / "tensorboard")["loss"] == [(1, 0.5), (2, 0.125)]


def test_several_trackers_get_the_same_rows(tmp_path, monkeypatch):
    for name in ("wandb", "tensorboard"):
        pytest.importorskip(name, reason=f"the trackers' test needs `pip install {name}`")
    names = ["wandb", "tensorboard"]
    config = SFTStageConfig(tracker=TrackerConfig(names=names, mode="offline"))
    writer = MetricsWriter(tmp_path, config, "sft", "0123")
    writer.write(7, {"loss": 0.5})
    writer.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert scalars(tmp_path / "tensorboard") == {"loss": [(7, 0.5)]}


def test_the_page_of_metrics_lists_every_name_with_its_meaning():
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", page, re.MULTILINE)
    shown = [(name.removesuffix("<component>"), text.replace("\\|", "|")) for name, text in rows]
    assert shown == list(METRICS.items())


def test_a_results_metrics_are_the_rows_and_by_a_name_the_figure_of_final(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 3, "loss": 2.0}\n{"step": 5, "eval_loss": 1}\n'
    )
    result = StageResult(tmp_path / "final", {"eval_loss": 0.5}, stage_dir=tmp_path)
    assert result.metrics == [{"step": 3, "loss": 2.0}, {"step": 5, "eval_loss": 1}]
    assert result.metrics[-1]["step"] == 5 and len(result.metrics[:1]) == 1
    assert result.metrics["eval_loss"] == 0.5  # what the attribute was before
    with pytest.raises(KeyError):
        result.metrics["loss"]
    assert StageResult(None, {}).metrics == []
    assert str(StageResult(None, {}, "a table")) == "a table"


class Recorder:
    """A tracker that records what accelerate's interface is asked for."""

    requires_logging_directory = False
    made: ClassVar[list] = []

    def __init__(self, project):
        self.calls = [project]
        self.made.append(self)

    def __getattr__(self, name):
        return lambda *values, **named: self.calls.append((name, *values, named))


def test_each_tracker_gets_our_step_and_only_wandb_gets_null(tmp_path, monkeypatch):
    for name in ("mlflow", "clearml"):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, Recorder)
    config = SFTStageConfig(tracker=TrackerConfig(names=["mlflow", "clearml"], project="mine"))
    trackers, wandb_rows = Trackers(tmp_path, config, "sft", None, 0), []
    trackers._wandb = SimpleNamespace(log=wandb_rows.append, finish=lambda: None)
    trackers.log(7, {"loss": 1.0, "kl": None})
    trackers.close()
    assert wandb_rows == [{"step": 7, "loss": 1.0, "kl": None}]
    assert len(Recorder.made) == 2
    for recorder in Recorder.made:
        project, start, (stored, values, _), *others = recorder.calls
        assert (project, start, stored) == ("mine", ("start", {}), "store_init_configuration")
        assert values["seed"] == config.seed
        assert others == [("log", {"loss": 1.0}, {"step": 7}), ("finish", {})]


def test_wandb_is_silent(tmp_path):
    pytest.importorskip("wandb")
    options = wandb_options(tmp_path, SFTStageConfig(), "run/sft", "id")
    assert options["settings"].silent and options["id"] == "id"
