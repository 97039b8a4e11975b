"""The store of judgements: queues, overlap, a submission that counts once, undo, kills.

Run: python -m pytest tests/rank/test_store.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf.rank.store
from rlhf.rank.store import Refused, Store, Task

ROOT = Path(__file__).resolve().parents[2]


def tasks(number: int) -> list[Task]:
    return [Task(i, f"question {i}", ["a", "b", "c"], ["x", "y", "y"]) for i in range(number)]


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path / "rankings.sqlite")
    store.add(tasks(4))
    return store


def rank(store: Store, annotator: str, ranks=(0, 1, 2), **more) -> int:
    """Rank what an annotator sees now; return the number of the task."""
    showing = store.next(annotator)
    store.submit(showing.token, annotator, "ranking", ranks, **more)
    return showing.task.number


def test_an_annotator_sees_each_task_once_in_order_and_then_none(store):
    assert [rank(store, "ann") for _ in range(4)] == [0, 1, 2, 3]
    assert store.next("ann") is None


def test_all_tabs_of_an_annotator_see_the_same_task(store):
    assert store.next("ann") == store.next("ann")


def test_without_overlap_two_annotators_share_the_queue(store):
    assert store.next("ann").task.number == 0
    assert rank(store, "bob") == 1
    assert [rank(store, "ann"), rank(store, "ann"), rank(store, "bob")] == [0, 2, 3]
    assert store.next("ann") is store.next("bob") is None


def test_overlap_gives_a_task_to_as_many_annotators_and_no_more(store):
    store.overlap = 2
    assert [rank(store, name) for name in ("ann", "bob", "cy", "cy", "ann")] == [0, 0, 1, 2, 1]


def test_a_task_whose_browser_disappeared_goes_to_others_and_its_late_ranking_counts(
    store, monkeypatch
):
    late = store.next("ann")
    monkeypatch.setattr(rlhf.rank.store, "RESERVED_SECONDS", -1.0)
    assert rank(store, "bob") == 0
    store.submit(late.token, "ann", "ranking", [0, 1, 2])
    assert [one.annotator for one in store.judgements()] == ["bob", "ann"]


def test_a_submission_counts_once_and_the_same_one_again_changes_nothing(store):
    token = store.next("ann").token
    for _ in range(2):
        store.submit(token, "ann", "ranking", [0, 1, 2])
    with pytest.raises(Refused, match="judged already"):
        store.submit(token, "ann", "ranking", [2, 1, 0])
    assert len(store.judgements()) == 1


@pytest.mark.parametrize(
    ("kind", "ranks", "message"),
    [("ranking", [0, 1], "Rank all 3"), ("liking", [], "A judgement is one of")],
)
def test_a_judgement_that_is_not_whole_is_refused(store, kind, ranks, message):
    token = store.next("ann").token
    with pytest.raises(Refused, match=message):
        store.submit(token, "ann", kind, ranks)
    assert store.judgements() == []


def test_the_token_of_another_annotator_is_refused(store):
    with pytest.raises(Refused, match="out of date"):
        store.submit(store.next("ann").token, "bob", "skip")


def test_ranks_follow_the_cards_back_to_the_answers_and_are_dense(store):
    showing = store.next("ann")
    texts = [showing.task.responses[card[0]] for card in showing.cards]
    ranks = [{"a": 7, "b": 3, "c": 7}[text] for text in texts]
    store.submit(showing.token, "ann", "ranking", ranks)
    (judged,) = store.judgements()
    assert judged.ranks == [1, 0, 1]
    assert [judged.shown.index(place) for place in range(3)] == [c[0] for c in showing.cards]


def test_cards_are_in_random_order(store):
    store.add([Task(i, "q", ["a", "b", "c"]) for i in range(10, 40)])
    orders = set()
    while (showing := store.next("ann")) is not None:
        orders.add(str(showing.cards))
        store.submit(showing.token, "ann", "skip")
    assert len(orders) == 6


def test_equal_answers_are_one_card_and_tie(tmp_path):
    store = Store(tmp_path / "equal.sqlite")
    store.add([Task(0, "q", ["same", "other", " same\n"])])
    showing = store.next("ann")
    assert sorted(map(len, showing.cards)) == [1, 2]
    store.submit(showing.token, "ann", "ranking", [len(card) % 2 for card in showing.cards])
    assert store.judgements()[0].ranks == [0, 1, 0]


def test_undo_shows_the_task_again_with_what_was_said(store):
    number = rank(store, "ann", [1, 0, 0], demonstration="better")
    rank(store, "bob")
    other = store.next("ann")
    assert store.undo("ann")
    again = store.next("ann")
    assert again.task.number == number and again.before["ranks"] == [1, 0, 0]
    assert again.before["demonstration"] == "better"
    assert [one.annotator for one in store.judgements()] == ["bob"]
    store.submit(again.token, "ann", "ranking", [0, 1, 1])
    assert store.next("ann") == other


def test_a_tab_that_was_open_before_an_undo_cannot_submit(store):
    old = store.next("ann").token
    store.submit(old, "ann", "skip")
    store.undo("ann")
    with pytest.raises(Refused):
        store.submit(old, "ann", "ranking", [0, 1, 2])
    assert not store.judgements() and not store.undo("ann")


def test_a_skipped_task_goes_to_others_and_comes_back_when_asked(store):
    store.submit(store.next("ann").token, "ann", "skip")
    assert rank(store, "bob") == 0
    assert [rank(store, "ann") for _ in range(3)] == [1, 2, 3]
    store.reopen_skipped("ann")
    assert store.next("ann").task.number == 0


def test_a_flagged_task_is_shown_to_nobody_else(store):
    store.overlap = 3
    store.submit(store.next("ann").token, "ann", "flag", reason="unsafe")
    assert rank(store, "bob") == 1


def test_another_order_shows_other_tasks_first(store):
    store.put_in_order({0: 3.0, 3: -2.5})
    assert [rank(store, "ann") for _ in range(4)] == [3, 1, 2, 0]


def test_a_conversation_is_saved_once_and_only_if_it_is_whole(store):
    turns = [{"role": role, "content": f"I am the {role}"} for role in ("user", "assistant")]
    before = store.changes()
    for _ in range(2):
        store.save_conversation("token", "ann", turns * 2)
    assert store.conversations() == [{"messages": turns * 2, "annotator": "ann"}]
    assert store.changes() == before + 1
    for bad in (
        [],
        turns[:1],
        turns[::-1],
        [*turns, turns[0]],
        [turns[0], {**turns[1], "content": " "}],
    ):
        with pytest.raises(Refused):
            store.save_conversation("other", "ann", bad)


def test_a_store_that_is_opened_again_continues(store):
    rank(store, "ann")
    open_task = store.next("ann")
    store.close()
    again = Store(store.file)
    assert again.next("ann") == open_task and len(again.judgements()) == 1


def test_a_kill_loses_no_submitted_ranking(tmp_path):
    """The process kills itself between two submissions; what it had confirmed is there."""
    code = f"""
import os, signal
from rlhf.rank.store import Store, Task
store = Store(__import__("pathlib").Path({str(tmp_path / "killed.sqlite")!r}))
store.add([Task(i, "q", ["a", "b"]) for i in range(50)])
for i in range(37):
    store.submit(store.next("ann").token, "ann", "ranking", [0, 1])
store._db.execute("BEGIN")
store._db.execute("UPDATE judgements SET undone = 1")
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment)
    assert killed.returncode == -signal.SIGKILL
    store = Store(tmp_path / "killed.sqlite")
    assert len(store.judgements()) == 37 and store.next("ann").task.number == 37
