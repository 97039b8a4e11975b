"""Knobs of a scorer that runs elsewhere: `scorer.endpoint` in PPO, options of other commands."""

from __future__ import annotations

from rlhf.config.fields import knob, knobs


@knobs
class EndpointConfig:
    """How a remote scorer is asked."""

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
