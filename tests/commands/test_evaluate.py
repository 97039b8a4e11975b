"""`python -m rlhf.evaluate`: two models compared by a judge or a scorer, and RewardBench.

Run: python -m pytest tests/commands/test_evaluate.py
"""

from __future__ import annotations

import json
import os
import re
import socket

import pytest
import torch
from helpers.endpoints import Answers, running
from helpers.judging import chat, prefers_long_answers, prefers_the_first
from helpers.scorers import policy_tokenizer, write_reward_model
from helpers.tiny_ppo import write_policy, write_prompts

from rlhf.evaluate.__main__ import main
from rlhf.evaluate.figures import conclusion, draw, examples, figures_of, markdown
from rlhf.evaluate.judgement import Judgement
from rlhf.evaluate.rewardbench import SECTIONS, measure, read_pairs
from rlhf.reward.report.measures import ranked_pairs


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def write(name, rows):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return name


def two_files(num=40):
    """Answers; those of b are longer in three of four rows, and the same in one of eight."""
    a, b = [], []
    for i in range(num):
        own = "a b c" if i % 4 else "a b c d e"
        other = own if i % 8 == 4 else "a b c d"
        a.append({"prompt": f"question {i}", "response": own, "source": i})
        b.append({"instruction": f"question {i}", "output": other})
    return [f"a={write('a.jsonl', a)}", f"b={write('b.jsonl', b)}"]


def report(folder="evaluation-pairwise"):
    with open(f"{folder}/report.json") as file:
        return json.load(file)


def judged(server, *arguments):
    return main([*two_files(), "model=wise", f"url={server.url}", *arguments])


def test_a_judge_compares_in_both_orders(capsys):
    with running(Answers(prefers_long_answers)) as server:
        assert judged(server) == 0
    assert len(server.requests) == 2 * 35
    found = report()
    assert [found[name] for name in ("wins_a", "ties", "wins_b")] == [5, 5, 30]
    assert found["win_rate"]["mean"] == 32.5 / 40 and found["inconsistent"] == 0
    assert 0.6 < found["win_rate"]["low"] < 32.5 / 40 < found["win_rate"]["high"] < 0.95
    with open("evaluation-pairwise/judgements.jsonl") as file:
        rows = [json.loads(line) for line in file]
    assert [row["winner"] for row in rows[:5]] == ["a", "b", "b", "b", "tie"]
    assert rows[0]["verdicts"] == ["a", "a"] and rows[4].keys() == {"prompt", "a", "b", "winner"}
    page = open("evaluation-pairwise/report.md").read()
    assert "## B wins" not in page and "## b wins" in page and "Longer is better. [[B]]" in page
    said = capsys.readouterr().out
    assert re.search(r"wins of a, ties, wins of b +5, 5, 30\n", said)
    assert "b is better" in said and "70 answers asked" in said
    assert re.search("at equal length +cannot be told: length explains every verdict", said)


def test_a_judge_that_likes_the_first_answer_shows_no_difference(capsys):
    with running(Answers(prefers_the_first)) as server:
        assert judged(server) == 0
    found = report()
    assert found["inconsistent"] == found["first_wins_in_both_orders"] == 35
    assert found["win_rate"]["mean"] == 0.5 and found["ties"] == 40
    said = capsys.readouterr().out
    assert "no difference is shown" in said and "changed its verdict with the order for 35" in said


def test_a_stopped_evaluation_asks_nothing_twice(capsys):
    def runs_out(body):
        left.append(0)
        return prefers_long_answers(body) if len(left) <= 20 else (402, {"error": "pay"})

    left = []
    with running(Answers(runs_out)) as server:
        assert judged(server, "num_requests=1") == 2
        assert "402 Payment Required: 'pay'" in capsys.readouterr().err
        assert judged(server, "rubric=harmlessness") == 2
        assert "rubric: helpfulness -> harmlessness" in capsys.readouterr().err
        server.answers[:] = [prefers_long_answers]
        before = len(server.requests)
        assert judged(server) == 0 and len(server.requests) == before + 70 - 20


def test_a_finished_evaluation_shows_its_table_again_and_asks_nothing(capsys):
    with running(Answers(prefers_long_answers)) as server:
        assert judged(server) == 0
        table = capsys.readouterr().out.partition("\njudge ")[0]
    written = os.stat("evaluation-pairwise/report.json").st_mtime_ns
    assert judged(server) == 0  # which is not there any more
    said = capsys.readouterr().out
    assert said.startswith("evaluation-pairwise/ is finished; this is its report, and another out=")
    assert said.endswith(f"{table}\n") and "win rate of b" in table
    gold = write("gold.jsonl", [{"prompt": "question 1", "gold": "a"}])
    assert judged(server, f"gold={gold}") == 2
    assert "gold: None -> gold.jsonl" in capsys.readouterr().err
    assert os.stat("evaluation-pairwise/report.json").st_mtime_ns == written


def test_gold_labels_correct_a_biased_judge(capsys):
    """The judge takes length for quality; people prefer a in all rows that they labelled."""
    labels = [{"prompt": f"question {i}", "gold": "a"} for i in range(20)]
    extra = [{"prompt": "another", "gold": "b"}, {"prompt": "question 39", "gold": None}]
    gold = write("gold.jsonl", labels + extra)
    with running(Answers(prefers_long_answers)) as server:
        assert judged(server, f"gold={gold}") == 0
    found = report()
    assert found["win_rate"]["low"] > 0.6
    trust = found["trust"]
    assert trust["num_gold"] == 20 and trust["agreement"]["mean"] == pytest.approx(3 / 20)
    assert os.path.getsize("evaluation-pairwise/report.png") > 1000
    assert trust["win_rate"]["mean"] < 0.1 and trust["win_rate"]["high"] < 0.5
    said = capsys.readouterr().out
    assert "1 of 21 gold labels belong to other prompts" in said and "a is better" in said
    assert re.search(r"the judge agrees with gold labels +0.15 \[0, 0.3\] of 20\n", said)


def test_verdicts_that_cannot_be_read_are_counted_and_left_out():
    def evasive(body):
        text = body["messages"][0]["content"]
        return chat("Hm.") if "question 7\n" in text else prefers_long_answers(body)

    with running(Answers(evasive)) as server:
        assert judged(server) == 0
    found = report()
    assert found["without_verdict"] == 1 and found["wins_b"] == 29


def more_words(prompts, responses):
    """A Python scorer that likes words."""
    return [len(response.split()) for response in responses]


def test_a_scorer_compares_and_its_totals_are_shown(capsys):
    assert main([*two_files(), "by=scorer", f"scorer=python:{__name__}.more_words"]) == 0
    found = report()
    assert [found[name] for name in ("wins_a", "ties", "wins_b")] == [5, 5, 30]
    assert (found["total_score_a"], found["total_score_b"]) == (140.0, 165.0)
    assert re.search(r"mean score of a, of b +3.5, 4.125\n", capsys.readouterr().out)


def noisy(prompts, responses):
    """A scorer with the rounding of another batch at every call."""
    calls.append(0)
    return [len(calls) * 1e-6] * len(responses)


calls: list[int] = []


def test_half_an_emoji_in_an_answer_loses_no_judgement(capsys):
    a = write("a.jsonl", [{"prompt": "Hi \ud83c", "response": "a \ud83c"}])
    b = write("b.jsonl", [{"prompt": "Hi \ud83c", "response": "b c d"}])
    assert main([f"a={a}", f"b={b}", "by=scorer", f"scorer=python:{__name__}.more_words"]) == 0
    [row] = map(json.loads, open("evaluation-pairwise/judgements.jsonl", encoding="utf-8"))
    assert (row["prompt"], row["a"], row["winner"]) == ("Hi \ufffd", "a \ufffd", "b")


def test_half_an_emoji_in_rewardbench_is_replaced():
    half = {"prompt": "Hi \ud83c", "chosen": "a \ud83c", "rejected": "b"}
    [row] = read_pairs(write("pairs.jsonl", [half]))
    assert row == {"prompt": "Hi \ufffd", "chosen": "a \ufffd", "rejected": "b", "subset": "all"}


def test_a_label_that_is_no_text_is_named(capsys):
    gold = write("gold.jsonl", [{"prompt": "Hi", "gold": ["a"]}])
    assert main([*two_files(), f"gold={gold}", "by=scorer", "scorer=os.path.join"]) == 2
    assert "gold must be a, b or tie, got ['a']" in capsys.readouterr().err


def test_equal_answers_are_a_tie_whatever_the_rounding():
    assert main([*two_files(), "by=scorer", f"scorer=python:{__name__}.noisy"]) == 0
    assert [report()[name] for name in ("wins_a", "ties", "wins_b")] == [0, 5, 35]


def test_people_compare_blind_and_go_on_later(monkeypatch, capsys):
    """The real command of the page without its server, and then what people said."""
    arguments = [*two_files(8), "by=people"]
    assert main([*arguments, "serve=false"]) == 2
    assert "nothing was ranked yet; leave serve=false out" in capsys.readouterr().err
    with open("evaluation-pairwise/pairs.jsonl") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 7 and all(row.keys() == {"prompt", "responses"} for row in rows)

    def rank(options):
        ranks = [[[0, 1]], [[1, 0]], [[0, 0]], [[0, 1], [1, 0]], [[1, 0], [1, 0], [0, 1]]]
        said = [row | {"ranks": r} for row, rs in zip(rows, ranks, strict=False) for r in rs]
        write(options.out, said)

    monkeypatch.setattr("rlhf.evaluate.people.rank", rank)
    assert main([*arguments, "port=0"]) == 0
    found = report()
    assert [found[name] for name in ("wins_a", "ties", "wins_b")] == [1, 3, 2]
    assert found["without_verdict"] == 2


def test_vicunas_ratio_follows_from_its_totals():
    """80 questions, two scores each: 638 for Vicuna-13B against 693 for ChatGPT, 92.1 %."""
    judgements = [Judgement("q", "x", "y", "a", scores=(693 / 80, 638 / 80)) for _ in range(80)]
    figures = {"a": "ChatGPT", "b": "Vicuna-13B", "by": "judge:helpfulness"} | figures_of(
        judgements
    )
    from rlhf.evaluate.figures import rows_of

    assert dict(rows_of(figures))["total score of a, of b"] == "693, 638 (b has 92.1% of a)"


def test_two_models_answer_and_are_compared(tmp_path, capsys):
    for name in ("one", "two"):
        write_policy(tmp_path / name)
    model = write_reward_model(tmp_path / "reward", policy_tokenizer(), seed=1)
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    arguments = ["a=one", "b=two", f"prompts={prompts}", "by=scorer", f"scorer={model}"]
    arguments += ["response_length=6", "out=result"]
    assert main(arguments) == 0
    found = report("result")
    assert found["num_prompts"] == 24 and found["ties"] == 24  # the same weights, the same seed
    assert "24 prompts say little" in capsys.readouterr().out
    assert (tmp_path / "result/a.jsonl").read_text() == (tmp_path / "result/b.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a=x"], "b is missing; add b=<a model, or a .jsonl file of answers>"),
        (["a=x", "b=y"], "prompts is missing; add prompts=<what x and y should answer>"),
        (["a=a.jsonl", "b=b.jsonl", "by=scorer"], "by=scorer needs scorer="),
        (["a=a.jsonl", "b=b.jsonl", "scorer=x.y"], "scorer=x.y needs by=scorer"),
        (["a=a.jsonl", "b=b.jsonl"], "a judge needs model=<its name> and url="),
        (["a=a.jsonl", "b=b.jsonl", "rubric=x"], "there is no rubric"),
        (["a=no.jsonl", "b=b.jsonl", "by=scorer", "scorer=os.path.join"], "a=no.jsonl is not a f"),
        (["a=a.jsonl", "b=c.jsonl", "by=scorer", "scorer=os.path.join"], "have an answer on one"),
        (["a=a.jsonl", "b=d.jsonl", "by=scorer", "scorer=os.path.join"], "row 1: expected `prompt"),
        (
            ["a=a.jsonl", "b=b.jsonl", "by=scorer", "scorer=os.path.join", "gold=a.jsonl"],
            "no row w",
        ),
        (["a=e.jsonl", "b=b.jsonl", "by=scorer", "scorer=os.path.join"], "a=e.jsonl has no rows"),
        (["a=a.jsonl", "b=f.jsonl", "by=scorer", "scorer=os.path.join"], "b: f.jsonl, row 1: not"),
        (["a=g.jsonl", "b=b.jsonl", "by=scorer", "scorer=os.path.join"], "g.jsonl, row 1: tool ca"),
        (["a=h.jsonl", "b=b.jsonl", "by=scorer", "scorer=os.path.join"], "row 1: field 'prompt'"),
        (["mode=rewardbench", "path=os.path.join", "data=f.jsonl"], "data: f.jsonl, row 1: not"),
        (["mode=rewardbench", "path=os.path.join", "data=g.jsonl"], "g.jsonl, row 1: tool calls"),
        (["mode=pair"], "mode must be one of pairwise, rewardbench"),
        (["mode=rewardbench", "path=x"], "data is missing; add data=<rows with prompt, chosen"),
        (["mode=rewardbench", "path=os.path.join", "data=a.jsonl"], "chosen"),
    ],
)
def test_what_cannot_be_evaluated_is_named(capsys, arguments, message):
    two_files(2)
    write("c.jsonl", [{"prompt": "question 0", "response": "x"}])
    write("d.jsonl", [{"prompt": "question 0", "responses": ["x", "y"]}])
    write("e.jsonl", [])
    write("g.jsonl", [{"prompt": [{"role": "tool"}], "response": "x"}])
    write("h.jsonl", [{"prompt": 5, "response": "x"}])
    with open("f.jsonl", "w") as file:
        file.write('{"prompt": ')
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use_is_refused_before_a_model_answers(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("rlhf.evaluate.pairs.generate", lambda options: pytest.fail("it answers"))
    sides = [f"{name}={write_policy(tmp_path / name)}" for name in ("a", "b")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        asked = f"prompts={write('prompts.jsonl', [{'prompt': 'q'}])}", "by=people", f"port={port}"
        assert main([*sides, *asked]) == 2
    said = capsys.readouterr().err
    assert f"port={port} of 127.0.0.1 cannot be opened: Address already in use; another" in said


def test_the_conclusion_looks_at_equal_length():
    """b is longer and wins; where it is shorter, it loses."""
    rows = [("b", 5, 50)] * 80 + [("a", 50, 5)] * 30
    judgements = [Judgement("q", "x" * a, "x" * b, won) for won, a, b in rows]
    figures = figures_of(judgements)
    assert conclusion(figures) in ("b is better", "b is better, but not at equal length")
    assert figures["length_controlled"]["length"] > 1
    assert conclusion({}) == "no comparison has a verdict"


def test_examples_are_wins_that_length_does_not_explain():
    judgements = [Judgement(str(n), "x" * 100, "x" * n, "b") for n in (50, 100, 200, 400)]
    judgements.append(Judgement("order", "x", "y", "tie", verdicts=("a", "b")))
    found = examples(judgements)
    assert [j.prompt for j in found["b wins"]] == ["50", "100", "200"]
    assert [j.prompt for j in found["The order decided"]] == ["order"] and not found["a wins"]


# --- RewardBench ----------------------------------------------------------------------------------


def test_the_page_shows_hidden_characters_and_keeps_markup_apart():
    text = "\u202eevil\x1b[31m\n# heading\u2028<script>"
    judgements = [Judgement(text, text, "x" * 9, "b", scores=(0.0, 1.0))]
    figures = {"a": "a", "b": "b", "by": "x.y"} | figures_of(judgements)
    page = markdown(figures, judgements)
    shown = "    [U+202E]evil[U+001B][31m\n    # heading[U+2028]<script>\n"
    assert page.count(shown) == 2 and not {"\u202e", "\x1b", "\u2028"} & set(page)


def test_a_picture_is_drawn_of_names_with_dollars(tmp_path):
    judgements = [Judgement("q", "x", "y", "a")] * 3
    figures = {"a": "runs/$x_$/a", "b": "b", "by": "x.y"} | figures_of(judgements)
    draw(figures).savefig(tmp_path / "picture.png")


def test_rewardbench_gives_accuracy_by_subset_and_at_equal_length(capsys):
    rows = [{"prompt": "q", "chosen": "a b c", "rejected": "d e", "subset": "easy"}] * 6
    rows += [{"prompt": "q", "chosen": "aa bb", "rejected": "c d e", "subset": "hard"}] * 3
    rows += [{"prompt": "q", "chosen": "a b", "rejected": "c d", "subset": "hard"}]
    write("bench.jsonl", rows)
    arguments = ["mode=rewardbench", f"path=python:{__name__}.more_words", "data=bench.jsonl"]
    assert main(arguments) == 0
    found = report("evaluation-rewardbench")["subsets"]
    assert found["easy"]["accuracy"] == 1 and found["hard"]["accuracy"] == 0.125
    assert found["all"]["accuracy"] == 0.65 and found["all"]["num_pairs"] == 10
    assert found["easy"]["length_matched_accuracy"] is None
    assert found["hard"]["num_length_matched"] == 4
    assert found["hard"]["length_matched_accuracy"] == 0.125
    said = capsys.readouterr().out
    assert re.search(r"easy +6 +1 \[1, 1\] +- +0 +1\n", said)
    assert "geometric mean of the subsets: 0.354" in said and "RewardBench score" not in said
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert again.startswith("evaluation-rewardbench/ is finished") and "easy " in again
    write("bench.jsonl", rows[1:])
    assert main(arguments) == 2
    assert "begun with other values" in capsys.readouterr().err


def test_the_sections_weigh_their_subsets_as_rewardbench_does():
    """One subset of each section is all wrong; PRM Math weighs as much as code."""
    wrong = {"mt-bench-med": 40 / 358, "mt-bench-hard": 37 / 456}
    wrong |= {"xstest-should-refuse": 250 / 740, "math-prm": 0.5}
    names = [name for section in SECTIONS.values() for name in section]
    scores = [torch.tensor([0.0, 1.0] if name in wrong else [1.0, 0.0]) for name in names]
    ranked = [{"ranks": [0, 1], "lengths": [3, 3]}] * len(names)
    found = measure(ranked_pairs(scores, ranked), names)
    expected = [1 - share for share in wrong.values()]
    assert list(found["sections"].values()) == pytest.approx(expected)
    assert found["score"] == pytest.approx(sum(expected) / 4)


def test_rows_without_a_subset_are_one():
    write("bench.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    assert read_pairs("bench.jsonl")[0]["subset"] == "all"
