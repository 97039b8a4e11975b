"""A judge, or another scorer, as one of the annotators: it ranks before people do.

It scores each answer alone, so that their order on the page does not matter. Left out: asking for
several prompts at once; the requests for the answers to one prompt go out together.
"""

from __future__ import annotations

from typing import Any

from rlhf.config import InputError, ScorerConfig
from rlhf.console import progress_bar, say
from rlhf.data.rows import ranks_of
from rlhf.inputs import check_scorer
from rlhf.rank.options import RankOptions
from rlhf.rank.store import Store, Task


def check_ranking_scorer(options: RankOptions) -> None:
    """Check what `scorer` names, before torch is imported."""
    if options.scorer is not None:
        check_scorer(options.scorer, options, "scorer", options.trust_remote_code)
    elif options.url or options.model:
        raise InputError(
            "url and model are those of a judge: add scorer=judge:helpfulness. To rank answers of "
            "a model at an endpoint, let it answer first: python -m rlhf.generate url=<endpoint> "
            f"model=<name> prompts={options.prompts} samples_per_prompt=4"
        )


def rank_by_scorer(options: RankOptions, store: Store) -> None:
    """Submit a ranking of every prompt that needs one more annotator; equal scores tie."""
    from rlhf.distributed import default_device
    from rlhf.scorers import judges, load_scorer

    name = str(options.scorer)
    if store.next(name) is None:
        return
    config = ScorerConfig(name, "none", options.batch_size, endpoint=options)
    device, code = options.device or default_device(), options.trust_remote_code
    scorer = load_scorer(config, device, "float32", "scorer", code)
    num_done = store.progress(name)["ranked"]
    with progress_bar(len(store.tasks()), num_done, "prompt") as bar:
        while (showing := store.next(name)) is not None:
            texts = [showing.task.responses[card[0]] for card in showing.cards]
            scores = _scores(scorer, showing.task, texts)
            store.submit(showing.token, name, "ranking", ranks_of(scores))
            bar.update(1)
    say(f"{name} ranked the answers to {store.progress(name)['ranked']:,} prompts")
    for judge in judges(scorer):
        say(judge.summary())


def _scores(scorer: Any, task: Task, texts: list[str]) -> list[float]:
    from rlhf.scorers import uncut_scores

    columns = {column: [value] * len(texts) for column, value in task.kept.items()}
    prompts = [task.prompt] * len(texts)
    return [float(x) for x in uncut_scores(scorer, prompts, texts, "scorer", columns).tolist()]
