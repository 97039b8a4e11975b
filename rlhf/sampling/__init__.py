"""Sampling responses from a policy: `generate`, with its settings and its random numbers.

`loop` is the engine: a decode loop on the cache of transformers that drops finished rows.
"""

from rlhf.sampling.loop import (
    Generation,
    Sampling,
    context_length,
    generate,
    sampling_for,
    stop_token_ids,
    stream,
    uniform_noise,
)
