"""The scorer that PPO does not train on, and what all scorers need from the rows.

The scorer that it trains on is one of its `actors`.
"""

from __future__ import annotations

from typing import Any

from rlhf.config import PPOStageConfig, is_judge, is_python, load_object
from rlhf.data import Splits, other_columns
from rlhf.rubrics import read_rubric
from rlhf.scorers import Scorer, load_scorer, python_scorers, require_columns


def load_independent_scorer(config: PPOStageConfig, device: Any) -> Scorer | None:
    """Load `evaluation.scorer`, if there is one; a reward model gives its raw scores."""
    path = config.evaluation.scorer
    if path is None:
        return None
    own, code = config.scorer.of_path(path, "none"), config.model.trust_remote_code
    return load_scorer(own, device, field="evaluation.scorer", trust_remote_code=code)


def require_scorer_columns(config: PPOStageConfig, scorer: Scorer | None, splits: Splits) -> None:
    """Refuse Python scorers and rubrics that need a column that training or held-out rows have not.
    Modules are imported, but no model is loaded.

    Args:
        scorer: replaces `config.scorer`.
    """
    paths = {"evaluation.scorer": config.evaluation.scorer}
    if scorer is None:
        parts = enumerate(config.scorer.components)
        paths["scorer.path"] = config.scorer.path
        paths |= {f"scorer.components[{i}].path": part.path for i, part in parts}
    given = {f: str(path) for f, path in paths.items()}
    functions = {f"{f}={p}": load_object(p, f) for f, p in given.items() if is_python(p)}
    functions |= {f"{f}={p}": read_rubric(p, f) for f, p in given.items() if is_judge(p)}
    if scorer is not None:
        functions |= python_scorers(scorer)
    for rows in (splits.train, splits.eval):
        for label, function in functions.items():
            if rows:
                require_columns(label, function, other_columns(rows))
