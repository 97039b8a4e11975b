"""Knobs of a scorer that runs elsewhere: `scorer.endpoint` in PPO, options of other commands."""

from __future__ import annotations

from rlhf.config.fields import knob, knobs


@knobs
class EndpointConfig:
    """How a remote scorer or a judge is asked."""

    model: str | None = None
    """What judges: the name of a model at url, or without url a stage directory, another model
    directory or a Hub id, which is loaded here."""
    url: str | None = None
    """OpenAI-compatible endpoint of the judge, such as http://127.0.0.1:8000/v1."""
    key_env: str | None = None
    """Environment variable that holds the key; its value is sent as a bearer token, and never
    written (null: no key)."""
    timeout: float = knob(60.0, gt=0)
    """Seconds to wait for an answer."""
    retries: int = knob(5, ge=0)
    """Number of further tries after no answer, a broken one, 429 or 5xx; the first waits a second,
    each further one twice as long."""
    num_requests: int = knob(8, ge=1)
    """Requests that are under way at once."""
    max_tokens: int = knob(512, ge=1)
    """Longest answer of the judge, tokens."""
    cache: str | None = None
    """File that keeps the judge's answers, so that none is paid for twice (null: judge.sqlite in
    ~/.cache/rlhf)."""
    max_unreadable: float = knob(0.1, ge=0, le=1)
    """End where more than this share of the judge's answers has no verdict; until then each counts
    as the lowest score, 1."""
    prices: list[float] = knob([])
    """Cost of a million tokens that the judge reads, and of a million that it writes, such as
    [0.5, 1.5]; empty: its cost is not summed up."""
