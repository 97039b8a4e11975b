"""Long conversations in pieces: what each piece holds, how long it is, what is dropped.

Run: python -m pytest tests/sft/test_splitting.py
"""

import json
from collections import Counter

import pytest
from helpers.rows import SHARED, assistant, user, write
from helpers.tokenizers import get_tokenizer, runs_of_labels

from rlhf.config import DatasetConfig, InputError
from rlhf.data import encode_row, load_rows, load_splits
from rlhf.sft.training_rows import describe_splitting, rounds_of, split_conversations, split_rows

SYSTEM = {"role": "system", "content": "Be brief."}


def turns(number, answer="It is sweet."):
    """A round of always the same length."""
    return [user(f"Why {number}?"), assistant(answer)]


def length(messages, tokenizer):
    return len(encode_row({"messages": messages}, tokenizer)[0])


# --- Rounds ---------------------------------------------------------------------------------------

U, A = user("u"), assistant("a")


@pytest.mark.parametrize(
    "messages, preamble, rounds",
    [
        ([U, A], [], [[U, A]]),
        ([SYSTEM, U, A, U, A], [SYSTEM], [[U, A], [U, A]]),
        ([U, U, A, A, U, A], [], [[U, U, A, A], [U, A]]),
        ([U, A, SYSTEM, U, A], [], [[U, A], [SYSTEM, U, A]]),
        ([U, A, U], [], [[U, A]]),
        ([SYSTEM, SYSTEM, U], [SYSTEM, SYSTEM], []),
    ],
)
def test_a_round_is_what_leads_to_an_answer_and_the_answer(messages, preamble, rounds):
    assert rounds_of(messages) == (preamble, rounds)


# --- Pieces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["plain", "vicuna_v1", "alpaca"])
def test_a_piece_holds_as_many_rounds_as_fit_and_the_system_message(template):
    tokenizer = get_tokenizer("byte", template)
    rounds = [turns(i) for i in range(1, 6)]
    one, two, _, four, five = rounds
    limit = length([SYSTEM, *one, *two], tokenizer)
    row = {"messages": [SYSTEM, *sum(rounds, []), user("and?")], "id": 7}
    counts = Counter()
    pieces = split_rows([row], tokenizer, limit, counts)
    assert [piece["messages"] for piece in pieces] == [
        [SYSTEM, *one, *two],
        [SYSTEM, *rounds[2], *four],
        [SYSTEM, *five],
    ]
    assert all(piece["id"] == 7 for piece in pieces)
    assert counts == Counter(conversations=1, pieces=3)
    shorter = split_rows([row], tokenizer, limit - 1, Counter())
    assert [piece["messages"] for piece in shorter] == [[SYSTEM, *pair] for pair in rounds]


def test_a_round_that_does_not_fit_is_dropped_and_parts_its_neighbours():
    tokenizer = get_tokenizer("byte")
    first, long, last = turns(1), turns(2, "z" * 200), turns(3)
    limit = length([*first, *last], tokenizer)
    counts = Counter()
    rows = split_rows([{"messages": [*first, *long, *last]}], tokenizer, limit, counts)
    assert [row["messages"] for row in rows] == [first, last]
    assert counts == Counter(conversations=1, pieces=2, dropped_rounds=1)
    counts = Counter()
    assert split_rows([{"messages": [*long, *long]}], tokenizer, limit, counts) == []
    assert counts == Counter(conversations=1, dropped_rounds=2, lost=1)
    assert describe_splitting(counts, limit) == (
        f"split 1 conversations longer than dataset.max_length={limit} tokens into 0 pieces; "
        "dropped 2 single rounds longer than that, and so the whole of 1 conversations"
    )


def test_what_fits_and_what_is_no_conversation_row_passes_through():
    tokenizer = get_tokenizer("byte")
    rows = [
        {"messages": turns(1)},
        {"prompt": "a", "completion": "z" * 200},
        {"prompt": [*turns(1), *turns(2), user("c")], "completion": [assistant("z" * 200)]},
    ]
    counts = Counter()
    assert split_rows(rows, tokenizer, length(turns(1), tokenizer), counts) == rows
    assert counts == Counter()


# --- Real conversations ---------------------------------------------------------------------------


def real_conversations(joined):
    """The 500 conversations, each `joined` of them in one."""
    file = SHARED / "data" / "sharegpt_dummy_conversation.json"
    if not file.exists():
        pytest.skip("the real conversations are not on this machine")
    rows, _ = load_rows(str(file), "sharegpt", "train", "sft")
    return [
        {"messages": sum((row["messages"] for row in rows[i : i + joined]), []), "number": i}
        for i in range(0, len(rows), joined)
    ]


# The longest of the 500 has 122 tokens (Pythia) or 136 (Llama): at 256 and 2048 they stay as they
# are, and it takes joined ones for a cut.
@pytest.mark.parametrize(
    "joined, limit",
    [
        (1, 64),
        *(
            pytest.param(joined, limit, marks=pytest.mark.slow)
            for joined, limit in [(1, 96), (1, 256), (1, 2048), (5, 256), (50, 2048)]
        ),
    ],
)
@pytest.mark.parametrize("tokenizer_name", ["pythia", "llama"])
def test_nothing_of_real_conversations_is_lost_without_a_count(tokenizer_name, joined, limit):
    tokenizer = get_tokenizer(tokenizer_name, "vicuna_v1")
    rows = real_conversations(joined)[: 3 if joined == 50 else None]
    counts = Counter()
    pieces = split_rows(rows, tokenizer, limit, counts)
    assert all(length(piece["messages"], tokenizer) <= limit for piece in pieces)
    long = [row for row in rows if length(row["messages"], tokenizer) > limit]
    assert counts["conversations"] == len(long) and bool(long) == (limit < 100 or joined > 1)
    num_lost = num_dropped = 0
    for row in rows:
        mine = [piece for piece in pieces if piece["number"] == row["number"]]
        expected = [
            (question, answer)
            for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True)
            if length([question, answer], tokenizer) <= limit
        ]
        kept = [message for piece in mine for message in piece["messages"]]
        assert list(zip(kept[::2], kept[1::2], strict=True)) == expected
        num_dropped += len(row["messages"]) // 2 - len(expected)
        num_lost += not mine
        if len(expected) == len(row["messages"]) // 2:  # nothing dropped: each piece is full
            for piece, after in zip(mine, mine[1:], strict=False):
                more = [*piece["messages"], *after["messages"][:2]]
                assert length(more, tokenizer) > limit
    assert (counts["dropped_rounds"], counts["lost"]) == (num_dropped, num_lost)
    assert counts["pieces"] == len(pieces) - (len(rows) - len(long))


@pytest.mark.parametrize("tokenizer_name", ["pythia", "llama"])
def test_labelled_text_of_each_piece_is_its_answers(tokenizer_name):
    tokenizer = get_tokenizer(tokenizer_name, "vicuna_v1")
    before = "" if tokenizer_name == "llama" else " "
    pieces = split_rows(real_conversations(1), tokenizer, 96, Counter())
    for piece in pieces:
        ids, labels = encode_row(piece, tokenizer)
        texts = [
            tokenizer.decode(stretch, clean_up_tokenization_spaces=False)
            for stretch in runs_of_labels(ids, labels)
        ]
        answers = [m["content"] for m in piece["messages"] if m["role"] == "assistant"]
        assert texts == [before + answer + tokenizer.eos_token for answer in answers]
        assert tokenizer.decode(ids).removeprefix("<s>").lstrip().startswith("A chat between a cur")


# --- Both sides -----------------------------------------------------------------------------------


def test_no_conversation_stands_on_both_sides(tmp_path):
    tokenizer = get_tokenizer("byte")
    rows = [
        {"id": i, "messages": sum((turns(f"{i} {j}") for j in range(1 + i % 7)), [])}
        for i in range(100)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    splits = load_splits(DatasetConfig(path=path, eval_fraction=0.3), "sft", seed=1)
    limit = length([*turns("10 0"), *turns("10 1")], tokenizer)
    pieces, line = split_conversations(splits, tokenizer, limit)
    sides = [{row["id"] for row in side} for side in (pieces.train, pieces.eval)]
    assert sides == [{row["id"] for row in side} for side in (splits.train, splits.eval)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(range(100))
    assert pieces.overlap == 0
    num_long = sum(len(row["messages"]) > 4 for row in rows)
    num_pieces = sum(-(-len(row["messages"]) // 4) for row in rows if len(row["messages"]) > 4)
    assert line == (
        f"split {num_long} conversations longer than dataset.max_length={limit} tokens into "
        f"{num_pieces} pieces; dropped 0 single rounds longer than that"
    )


def test_pieces_that_start_alike_are_counted_as_overlap(tmp_path):
    tokenizer = get_tokenizer("byte")
    shared = turns(0)
    sides = {name: [{"messages": [*shared, *turns(name)]}] for name in ("train", "eval")}
    paths = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in sides.items()}
    config = DatasetConfig(path=paths["train"], eval_path=paths["eval"])
    splits = load_splits(config, "sft", seed=1)
    assert splits.overlap == 0
    pieces, _ = split_conversations(splits, tokenizer, length(turns("train"), tokenizer))
    assert len(pieces.eval) == 2 and pieces.overlap == 1


def test_a_limit_that_no_round_fits_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns(1)}))
    splits = load_splits(DatasetConfig(path=str(path), eval_path=str(path)), "sft", seed=1)
    with pytest.raises(InputError, match="max_length=3 leaves no round of any conversation to tra"):
        split_conversations(splits, get_tokenizer("byte"), 3)
