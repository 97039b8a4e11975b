"""`mode=pairwise`: which of two models answers better, by a judge, a scorer or people.

Left out: more than two models at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoint.disk import write_whole
from rlhf.config import InputError, show
from rlhf.console import quiet_libraries, say, warn
from rlhf.curves import plot_hint
from rlhf.data import read_rows
from rlhf.evaluate.figures import draw, figures_of, markdown, show_figures
from rlhf.evaluate.judgement import Judgement
from rlhf.evaluate.options import REPORT, EvaluateOptions
from rlhf.evaluate.pairs import Pair, begin, key_of, load_pairs, prompt_of
from rlhf.evaluate.people import by_people
from rlhf.functional import wins
from rlhf.scorers import Judge, judges, load_scorer, score_responses

LABELS = {"a": 0.0, "tie": 0.5, "b": 1.0}
AT_ONCE = 64  # comparisons between two looks at what was found


def compare_models(options: EvaluateOptions) -> None:
    """Compare two models, write the judgements and the report, and print the table; of a finished
    comparison only print it."""
    gold = read_gold(options.gold) if options.gold else {}
    quiet_libraries()
    folder = Path(options.folder)
    if (finished := begin(options, folder)) is not None:
        show_figures(finished)
        return
    pairs = load_pairs(options, folder)
    scorer: Any = None
    if options.by == "people":
        judgements = by_people(options, pairs, folder)
    else:
        judgements, scorer = judge_pairs(options, pairs)
    text = "".join(json.dumps(j.row, ensure_ascii=False) + "\n" for j in judgements)
    (folder / "judgements.jsonl").write_text(text, encoding="utf-8")
    labels = match_gold(judgements, gold)
    names = {"a": str(options.a), "b": str(options.b)}
    report = names | {"by": _described(options)} | figures_of(judgements, labels)
    (folder / "report.md").write_text(markdown(report, judgements), encoding="utf-8")
    hint = plot_hint("report.png")
    if "win_rate" in report and not hint:
        draw(report).savefig(folder / "report.png")
    write_whole(folder / REPORT, json.dumps(report, indent=2) + "\n")
    show_figures(report)
    for judge in judges(scorer):
        say(judge.summary())
    picture = "" if hint else ", report.png"
    say(f"\nsaved {folder}/: report.json, report.md{picture}, judgements.jsonl")


def _described(options: EvaluateOptions) -> str:
    by = {"scorer": options.scorer, "people": "people"}
    return str(by.get(options.by, f"{options.model}, {options.rubric}"))


def judge_pairs(options: EvaluateOptions, pairs: Sequence[Pair]) -> tuple[list[Judgement], Any]:
    """Compare the answers of each pair; return also the judge or scorer that did it."""
    from rlhf.distributed import default_device

    by_judge = options.by == "judge"
    path, field = (options.judge_path, "rubric") if by_judge else (str(options.scorer), "scorer")
    own = options.scorer_config(path)
    code = options.trust_remote_code
    scorer = load_scorer(own, default_device(), field=field, trust_remote_code=code)
    one: Callable[..., list[Judgement]] = by_verdicts if by_judge else by_scores
    found: list[Judgement] = []
    for start in range(0, len(pairs), AT_ONCE):
        found += one(scorer, pairs[start : start + AT_ONCE])
    return found, scorer


def by_verdicts(judge: Judge, pairs: Sequence[Pair]) -> list[Judgement]:
    """Ask a judge in both orders; who wins in one order only has a tie. Equal answers are a tie
    without being asked about."""
    asked = [pair for pair in pairs if pair.a.strip() != pair.b.strip()]
    prompts = [pair.prompt for pair in asked]
    a, b = [pair.a for pair in asked], [pair.b for pair in asked]
    columns = columns_of(asked)
    first = judge.compare(prompts, a, b, columns)
    second = judge.compare(prompts, b, a, columns)
    swapped = {"a": "b", "b": "a", "tie": "tie", None: None}
    answers = iter(zip(first, second, strict=True))
    found = []
    for pair in pairs:
        if pair.a.strip() == pair.b.strip():
            found.append(Judgement(pair.prompt, pair.a, pair.b, "tie"))
            continue
        (one, reason), (other, other_reason) = next(answers)
        verdicts = one, swapped[other]
        winner = None if None in verdicts else verdicts[0] if len({*verdicts}) == 1 else "tie"
        reasons = reason, other_reason
        found.append(Judgement(pair.prompt, pair.a, pair.b, winner, verdicts, reasons))
    return found


def by_scores(scorer: Any, pairs: Sequence[Pair]) -> list[Judgement]:
    """The answer with the higher score wins; equal answers are a tie."""
    prompts, columns = [pair.prompt for pair in pairs], columns_of(pairs)
    texts = [pair.a for pair in pairs], [pair.b for pair in pairs]
    both = [score_responses(scorer, prompts, t, "scorer", columns=columns) for t in texts]
    cut = sum(int(scores.cut.sum()) for scores in both if scores.cut is not None)
    if cut:
        warn(f"{cut} answers are longer than the scorer's context; it read their beginning")
    same = torch.tensor([pair.a.strip() == pair.b.strip() for pair in pairs])
    a = both[0].total
    b = torch.where(same, a, both[1].total)  # not apart by the rounding of other batches
    names = {value: name for name, value in LABELS.items()}
    rows = zip(pairs, wins(b, a).tolist(), a.tolist(), b.tolist(), strict=True)
    return [Judgement(p.prompt, p.a, p.b, names[won], scores=(x, y)) for p, won, x, y in rows]


def columns_of(pairs: Sequence[Pair]) -> dict[str, list[Any]]:
    """The other fields of the rows: name -> a value for each pair."""
    names = dict.fromkeys(name for pair in pairs for name in pair.columns)
    return {name: [pair.columns.get(name) for pair in pairs] for name in names}


# --- Gold labels ----------------------------------------------------------------------------------


def read_gold(path: str) -> dict[str, str]:
    """Read labels by people: key of the prompt -> a, b or tie.

    Raises:
        InputError: a row without prompt or label, or two labels for a prompt that differ.
    """
    found: dict[str, str] = {}
    for where, row in read_rows(path, "train", "ppo", "gold"):
        prompt = prompt_of(row, where, "gold")
        label = row.get("gold")
        if label is None:
            continue
        if label not in [*LABELS]:  # a list: a label may be anything
            raise InputError(f"gold: {where}: gold must be a, b or tie, got {show(label)}")
        key = key_of(prompt)
        if found.setdefault(key, label) != label:
            raise InputError(f"gold: {where}: this prompt has another label before")
    if not found:
        raise InputError(f"gold={path} has no row with `gold`: a, b or tie")
    return found


def match_gold(judgements: Sequence[Judgement], gold: dict[str, str]) -> Tensor | None:
    """The label of each judgement, nan where it has none; None without gold labels."""
    if not gold:
        return None
    labels = [gold.get(key_of(judgement.prompt)) for judgement in judgements]
    known = sum(label is not None for label in labels)
    if known < len(gold):
        say(f"{len(gold) - known} of {len(gold)} gold labels belong to other prompts")
    values = [torch.nan if label is None else LABELS[label] for label in labels]
    return torch.tensor(values)
