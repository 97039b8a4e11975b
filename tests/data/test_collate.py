"""Padding, and batches of ranked rows."""

from __future__ import annotations

from rlhf.data import RankedCollator, pad


def test_pad_fills_either_side_up_to_the_longest_row():
    assert pad([[1, 2], [3]], 0).tolist() == [[1, 2], [3, 0]]
    assert pad([[1, 2], [3]], 9, side="left").tolist() == [[1, 2], [9, 3]]
    assert pad([[True], [True, True]], False).tolist() == [[True, False], [True, True]]


def test_collator_masks_by_length_even_where_pad_is_eos():
    eos = 9
    rows = [
        {"input_ids": [[5, 6, eos], [5, eos]], "ranks": [1, 0], "lengths": [2, 1], "row": 4},
        {"input_ids": [[7, 8, 8, eos], [7, eos, eos], [7, eos]], "ranks": [0, 1, 1]},
    ]
    batch = RankedCollator(pad_token_id=eos)(rows)
    assert batch["input_ids"].tolist() == [
        [5, 6, 9, 9],
        [5, 9, 9, 9],
        [7, 8, 8, 9],
        [7, 9, 9, 9],
        [7, 9, 9, 9],
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 0],
        [1, 1, 0, 0],
    ]
    assert batch["ranks"].tolist() == [1, 0, 0, 1, 1]
    assert batch["groups"].tolist() == [0, 0, 1, 1, 1]
