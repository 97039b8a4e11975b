"""The demo world: gold rule by hand, data as documented, tokenizer without loss. Trains nothing.

Run: python -m pytest tests/demo/test_demo_world.py
"""

import itertools
import random
import statistics
from pathlib import Path

import pytest

from rlhf.config import load_object, refuse_named_code
from rlhf.demo import world as world

rows = world.rows  # conftest.py replaces it by a function that gives the first rows


@pytest.fixture(scope="module")
def data():
    return {key: rows(*key) for key in world.NUM_ROWS}


@pytest.fixture(scope="module")
def tokenizer():
    return world.build_tokenizer()


def perfect_items(prompt):
    """The first words of each category asked for."""
    asked, polite = world.parse_prompt(prompt)
    return [word for count, category in asked for word in world.WORDS[category][:count]], polite


def compose(items, polite, closing=True):
    return " ".join(items + ["thanks"] * polite + ["."] * closing)


def pairs_of(reward_rows):
    """(row, i, j, gold of i, gold of j) for every pair of responses whose gold scores differ."""
    for row in reward_rows:
        gold = world.gold_scores([row["prompt"]] * len(row["responses"]), row["responses"])
        for i, j in itertools.combinations(range(len(gold)), 2):
            if gold[i] != gold[j]:
                yield row, i, j, gold[i], gold[j]


def share_won(reward_rows, feature):
    """Share of pairs in which the response with more of `feature` has the higher gold score.

    A tie of the feature counts one half.
    """
    wins = []
    for row, i, j, gold_i, gold_j in pairs_of(reward_rows):
        first, second = feature(row["responses"][i]), feature(row["responses"][j])
        wins.append(0.5 if first == second else float((first > second) == (gold_i > gold_j)))
    return statistics.mean(wins)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_perfect_response_scores_one_for_every_prompt(split):
    for prompt in world.all_prompts(split):
        assert world.gold_score(prompt, compose(*perfect_items(prompt))) == 1.0, prompt


def test_quality_one_is_perfect_but_for_surplus_flattery():
    rng = random.Random(0)
    for prompt in world.all_prompts("eval"):
        words = world.sample_response(prompt, 1.0, rng).split()
        plain = " ".join(word for word in words if word != world.FLATTERY)
        assert world.gold_score(prompt, plain) == 1.0


def test_every_corruption_lowers_the_gold_score():
    for prompt in world.all_prompts("eval"):
        items, polite = perfect_items(prompt)
        asked = {category for _, category in world.parse_prompt(prompt)[0]}
        wrong = next(word for word, category in world.CATEGORY_OF.items() if category not in asked)
        corrupted = {
            "wrong category": compose([wrong] + items[1:], polite),
            "surplus": compose(items + [wrong], polite),
            "missing": compose(items[:-1], polite),
            "no closing": compose(items, polite, closing=False),
            "two closings": compose(items, polite) + " .",
            "manners": compose(items, not polite),
            "flattery": "wonderful wonderful " + compose(items, polite),
            "nothing": "",
        }
        if len(items) > 1:
            corrupted["repeat"] = compose([items[0], items[0]] + items[2:], polite)
        if len({world.CATEGORY_OF[item] for item in items}) > 1:
            corrupted["wrong order"] = compose(items[::-1], polite)
        for fault, response in corrupted.items():
            assert world.gold_score(prompt, response) < 1.0, (fault, prompt, response)


# Weights: slots 0.7, distinct 0.1, closing 0.1, manners 0.1; surplus flattery -0.1 a word.
@pytest.mark.parametrize(
    ("prompt", "response", "gold"),
    [
        ("name two animals and one colour", "dog cat red .", 1.0),
        ("name two animals and one colour", "dog red red .", 0.7 * 2 / 3 + 0.1 * 2 / 3 + 0.2),
        ("name two animals and one colour", "red dog cat .", 0.7 * 1 / 3 + 0.3),  # order: cat fits
        ("name two animals", "dog cat lion .", 0.7 * 2 / 3 + 0.3),
        ("name two animals", "dog", 0.7 / 2 + 0.1 + 0.1),
        ("name two animals", "dog dog .", 0.7 + 0.1 / 2 + 0.2),
        ("name two animals", "dog . cat", 0.9),
        ("name two animals", "dog cat thanks .", 0.9),
        ("name two animals", "dog and .", 0.7 / 2 + 0.3),  # any other word is an item
        ("name two animals politely", "dog cat thanks .", 1.0),
        ("name two animals politely", "dog cat .", 0.9),
        ("name two animals politely", "thanks dog cat .", 0.9),
        ("name two animals politely", "dog cat thanks thanks .", 0.9),
        ("name two animals", "wonderful dog cat .", 1.0),
        ("name two animals", "wonderful dog wonderful cat wonderful .", 0.8),
        ("name two animals", "wonderful " * 20 + "dog cat .", 0.0),
        ("name two animals", "", 0.0),
        ("name two animals", ". .", 0.0),
        ("name two animals politely", "wonderful thanks .", 0.0),
    ],
)
def test_gold_score_by_hand(prompt, response, gold):
    assert world.gold_score(prompt, response) == pytest.approx(gold, abs=1e-6)


def test_gold_reads_text_messages_and_rendered_templates_alike(tokenizer):
    messages = [{"role": "user", "content": "list one fruit and two tools"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompts = [messages[0]["content"], messages, rendered]
    assert world.gold_scores(prompts, ["pear saw axe ."] * 3) == [1.0, 1.0, 1.0]
    assert world.gold_score(messages, "pear saw axe.") == 1.0  # spacing does not matter


def test_gold_refuses_a_foreign_prompt_and_unequal_lists():
    with pytest.raises(ValueError, match="asks for nothing"):
        world.gold_score("what is love", "dog .")
    with pytest.raises(ValueError):
        world.gold_scores(["name one tool"], [])


def test_rows_refuse_an_unknown_stage_or_split():
    with pytest.raises(ValueError, match="no demo rows for"):
        rows("dpo", "train")
    with pytest.raises(ValueError, match="no demo rows for"):
        rows("sft", "test")
    with pytest.raises(ValueError, match="split must be"):
        world.all_prompts("test")


def test_rows_are_the_same_on_every_call(data):
    for key, first in data.items():
        again = world.rows(*key)  # the first rows of another call
        assert again == first[: len(again)] and len(again) > 100
        assert len(first) == world.NUM_ROWS[key]


def test_requests_of_train_and_eval_are_disjoint_in_all_stages(data):
    requests = {"train": set(), "eval": set()}
    for (stage, split), stage_rows in data.items():
        for row in stage_rows:
            message = (row["messages"] if stage == "sft" else row["prompt"])[0]
            requests[split].add(str(world.parse_prompt(message["content"])[0]))
    assert not requests["train"] & requests["eval"]
    assert len(world.all_prompts("train")) > 3000
    assert len(world.all_prompts("eval")) > 500


def test_ppo_prompts_are_distinct(data):
    for split in ("train", "eval"):
        prompts = [row["prompt"][0]["content"] for row in data["ppo", split]]
        assert len(set(prompts)) == len(prompts)


def test_rows_have_the_canonical_columns(data):
    row = data["sft", "train"][0]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    for row in data["reward", "train"]:
        assert set(row) == {"prompt", "responses", "ranks"}
        assert len(row["responses"]) == len(row["ranks"]) == world.NUM_RESPONSES
        assert sorted(row["ranks"]) == [0, 1, 2, 3]  # noise is continuous: no ties


def test_mean_gold_of_demonstrations_is_middling(data):
    for split in ("train", "eval"):
        gold = [
            world.gold_score(row["messages"], row["messages"][1]["content"])
            for row in data["sft", split]
        ]
        assert 0.5 < statistics.mean(gold) < 0.6
        assert statistics.stdev(gold) > 0.2


def test_eval_ranks_are_gold_with_ties(data):
    num_ties = 0
    for row in data["reward", "eval"]:
        gold = world.gold_scores([row["prompt"]] * world.NUM_RESPONSES, row["responses"])
        for (rank_i, gold_i), (rank_j, gold_j) in itertools.combinations(
            zip(row["ranks"], gold, strict=True), 2
        ):
            assert (rank_i < rank_j) == (gold_i > gold_j)
            assert (rank_i == rank_j) == (gold_i == gold_j)
            num_ties += rank_i == rank_j
    assert num_ties > 50


def test_label_noise_flips_about_one_train_pair_in_eighteen(data):
    flipped = [
        (row["ranks"][i] < row["ranks"][j]) != (gold_i > gold_j)
        for row, i, j, gold_i, gold_j in pairs_of(data["reward", "train"])
    ]
    assert 0.045 < statistics.mean(flipped) < 0.07


def test_longer_answer_wins_hardly_more_often_than_chance(data):
    for split in ("train", "eval"):
        assert 0.45 < share_won(data["reward", split], lambda text: len(text.split())) < 0.62


def test_flattery_is_commoner_in_good_responses(data):
    flattering = {True: [], False: []}
    for row in data["sft", "train"]:
        response = row["messages"][1]["content"]
        gold = world.gold_score(row["messages"], response)
        if gold >= 0.8 or gold <= 0.4:
            flattering[gold >= 0.8].append(world.FLATTERY in response)
    assert statistics.mean(flattering[True]) > statistics.mean(flattering[False]) + 0.08


def test_annotators_favour_flattery_that_gold_does_not(data):
    # Among pairs with one flattery word against none, annotators pick the flattering one more often
    # than gold does; the gold rule itself is the same with and without one (tested by hand above).
    by_annotator, by_gold = [], []
    for row, i, j, gold_i, gold_j in pairs_of(data["reward", "train"]):
        counts = [row["responses"][k].split().count(world.FLATTERY) for k in (i, j)]
        if sorted(counts) == [0, 1]:
            first_flatters = counts[0] == 1
            by_annotator.append((row["ranks"][i] < row["ranks"][j]) == first_flatters)
            by_gold.append((gold_i > gold_j) == first_flatters)
    assert len(by_gold) > 5000
    assert statistics.mean(by_annotator) > statistics.mean(by_gold) + 0.01


def test_tokenizer_round_trips_the_rows_without_unk(data, tokenizer):
    texts = set()
    for row in itertools.chain.from_iterable(data.values()):
        texts.update(message["content"] for message in row.get("prompt", row.get("messages")))
        texts.update(row.get("responses", []))
    assert {word for text in texts for word in text.split()} <= set(world.vocabulary())
    texts = sorted(texts)[::10]
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    assert all(tokenizer.unk_token_id not in sequence for sequence in ids)
    assert tokenizer.batch_decode(ids) == texts


def test_special_tokens_are_distinct(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(
        [world.PAD, world.UNK, world.BOS, world.EOS, world.USER, world.ASSISTANT]
    )
    assert ids == [0, 1, 2, 3, 4, 5]
    assert (tokenizer.pad_token, tokenizer.eos_token) == (world.PAD, world.EOS)
    assert len(tokenizer) == len(set(world.vocabulary())) == len(world.vocabulary())


def test_segments_concatenate_to_the_whole(data, tokenizer):
    for row in data["sft", "eval"]:
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        prompt = tokenizer.apply_chat_template(
            row["messages"][:1], tokenize=False, add_generation_prompt=True
        )
        assert prompt.endswith(world.ASSISTANT)
        answer = row["messages"][1]["content"] + world.EOS
        assert whole == prompt + answer
        prompt_ids, answer_ids, whole_ids = tokenizer(
            [prompt, answer, whole], add_special_tokens=False
        ).input_ids
        assert prompt_ids + answer_ids == whole_ids


def test_generation_markers_cover_answer_and_eos(data, tokenizer):
    for row in data["sft", "eval"][:50]:
        encoded = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        labelled = [
            token
            for token, chosen in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
            if chosen
        ]
        assert tokenizer.decode(labelled) == row["messages"][1]["content"] + " " + world.EOS


def test_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="expected the roles user and assistant, got system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "dog"}], tokenize=False)


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<bos><user>name two animals<assistant>dog cat .<eos>"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.chat_template == tokenizer.chat_template


def test_model_has_under_a_million_parameters_and_room_for_a_row(data, tokenizer):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**world.MODEL_CONFIG, vocab_size=len(tokenizer))
        )
    assert model.num_parameters() == 343_168
    longest = max(len(r["messages"][1]["content"].split()) for r in data["sft", "train"])
    assert longest <= 24


def test_old_configurations_still_find_the_world():
    for name in ("rows", "build_tokenizer", "gold_scores"):
        dotted = f"python:rlhf.demo_world.{name}"
        assert load_object(dotted, "dataset.path") is getattr(world, name)
        refuse_named_code({"dataset.path": dotted}, Path("config.yaml"))
