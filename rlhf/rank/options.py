"""The command line of `python -m rlhf.rank`."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config import EndpointConfig, knob
from rlhf.policy import PolicyOptions
from rlhf.web.server import ServerOptions


@dataclass(kw_only=True)
class RankOptions(ServerOptions, EndpointConfig, PolicyOptions):
    """The command line."""

    path: list[str] | None = None  # type: ignore[assignment]
    """Policies that answer, one or several that compete: [a,b]. Rows with `responses` need none."""
    prompts: str
    """Prompts: a .jsonl, .json, .csv or .parquet file, or a .txt file of lines. A row may have the
    answers to rank as `responses`."""
    out: str | None = None
    """File of the rankings (default: <name>.rankings.jsonl in the folder of the prompts)."""
    samples_per_prompt: int = knob(4, ge=2, le=9)
    """Answers to each prompt, in turn from each of the policies."""
    batch_size: int = knob(32, ge=1)
    """Answers sampled together."""
    order: str = knob("file", choices=("file", "random", "disagreement"))
    """Which prompts people see first: as in the file, random, or those on whose answers the reward
    models disagree most."""
    reward_models: list[str] | None = None
    """The reward models of order=disagreement, two or more: [a,b]."""
    overlap: int = knob(1, ge=1)
    """Annotators who rank each prompt; 2 or more show how far they agree."""
    annotators: list[str] | None = None
    """Names of the annotators (default: anybody who gives a name)."""
    scorer: str | None = None
    """A scorer that ranks too, as one of the annotators, before people do: judge:<rubric>, a reward
    model, module.function or a URL."""
    serve: bool = True
    """false: only write the files of what is ranked so far."""
