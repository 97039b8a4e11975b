"""What the processes of a run say to each other when one of them fails, or was started otherwise.

Two of them with real failures are in tests/end_to_end/test_failing_ranks.py.

Run: python -m pytest tests/test_failures.py
"""

import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from rlhf import failures
from rlhf.config import InputError
from rlhf.failures import blame, fingerprint, lost_the_others, phase, report, require_equal

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"


@pytest.fixture
def ranks(monkeypatch):
    """Three processes of a group, in turn in this one: call with a rank to be that process."""
    store = dist.HashStore()
    monkeypatch.setattr(failures, "_get_default_store", lambda: store)
    monkeypatch.setattr(failures.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(failures, "WORD_SECONDS", 300)  # for words that are there
    monkeypatch.setenv("WORLD_SIZE", "3")
    return lambda rank: monkeypatch.setenv("RANK", str(rank))


def failed(error, *phases):
    """An exception as it comes out of nested phases, the innermost first."""
    if not phases:
        return error
    try:
        with phase(phases[-1]):
            raise failed(error, *phases[:-1])
    except Exception as caught:
        return caught


def test_first_process_names_rank_phase_and_error_of_the_one_that_failed(ranks):
    ranks(2)
    report(failed(MemoryError("no room"), "scoring", "update 3"))
    ranks(0)
    report(RuntimeError(GLOO))
    ranks(1)
    assert blame(failed(RuntimeError(GLOO), "training", "update 3")).startswith(
        "rank 1 (training, update 3): "
    )
    ranks(0)
    assert blame(failed(RuntimeError(GLOO), "training", "update 3")) == (
        "rank 2 (scoring, update 3): MemoryError: no room; the same command with resume=auto goes "
        "on from the newest checkpoint"
    )


def test_bad_input_of_another_process_is_told_without_its_type(ranks):
    ranks(1)
    report(InputError("dataset.path=rows.jsonl is not there"))
    ranks(0)
    assert blame(RuntimeError(GLOO)).startswith(
        "rank 1 (before training): dataset.path=rows.jsonl is not there;"
    )


def test_first_process_names_the_ranks_that_left_no_word(ranks, monkeypatch):
    monkeypatch.setattr(failures, "WORD_SECONDS", 1.0)
    ranks(1)
    blame(RuntimeError(GLOO))
    ranks(0)
    assert blame(failed(RuntimeError(GLOO), "sampling", "update 1")).startswith(
        "no word from rank 2: killed (main memory may have run out), hanging, or on a host that "
        "cannot be reached; rank 0 (sampling, update 1): RuntimeError: "
    )


def test_other_processes_say_that_the_first_one_is_gone(ranks, monkeypatch):
    monkeypatch.setattr(failures, "WORD_SECONDS", 0.2)
    ranks(1)
    error = failed(RuntimeError(GLOO), "training", "update 2")
    gone = "no word from rank 0: killed (main memory may have run out), hanging, or on a host that "
    assert blame(error).startswith(f"{gone}cannot be reached; rank 1 (training, update 2): ")
    monkeypatch.setattr(failures, "WORD_SECONDS", -0.9)  # waits for 0.1 seconds
    ended, began = threading.Event(), time.monotonic()
    silent = SimpleNamespace(set=lambda *_: None, check=lambda _: ended.wait(300))
    monkeypatch.setattr(failures, "_get_default_store", lambda: silent)
    assert blame(error).startswith(gone) and time.monotonic() - began < 60
    ended.set()


@pytest.mark.parametrize(
    "error", [RuntimeError(GLOO), dist.DistBackendError("x"), dist.DistStoreError("x")]
)
def test_lost_processes_are_told_from_other_errors(error):
    assert lost_the_others(error)
    assert not lost_the_others(RuntimeError("CUDA out of memory"))


def started(monkeypatch, *everyone):
    """Have the group gather these values."""
    monkeypatch.setenv("WORLD_SIZE", str(len(everyone)))
    monkeypatch.setattr(failures, "gather_object", lambda own: list(everyone))


def test_processes_that_were_started_otherwise_are_refused_by_setting(monkeypatch):
    started(monkeypatch, {"seed": 1, "a": 2}, {"seed": 1, "a": 2}, {"seed": 3, "a": 2, "b": 4})
    with pytest.raises(InputError) as caught:
        require_equal({})
    assert str(caught.value) == (
        "the processes were not started alike:\n  seed: 1 on rank 0, 3 on rank 2\n"
        "  b: None on rank 0, 4 on rank 2\n"
        "Give all of them the same command, settings and files"
    )
    started(monkeypatch, {"seed": 1}, {"seed": 1})
    require_equal({})


def test_rows_differ_in_number_order_or_content():
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    others = [rows[:1], rows[::-1], [{"prompt": "a"}, {"prompt": "c"}]]
    assert fingerprint(rows) == fingerprint([dict(row) for row in rows])
    assert len({fingerprint(rows), *map(fingerprint, others)}) == 4


def test_rows_of_objects_and_of_names_that_are_no_texts_have_a_fingerprint():
    made = [[{"prompt": "a", 1: "b", (2, 3): "c", "x": failures}] for _ in range(2)]
    for rows in made:
        rows[0]["own"] = type("Own", (), {})()
    assert fingerprint(made[0]) == fingerprint(made[1])


def test_one_process_asks_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(failures, "gather_object", os.abort)
    require_equal({"seed": 1})
    assert failures.same_rows([]) == []
