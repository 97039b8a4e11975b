"""Sampling responses from a policy: `generate`, with its settings and its random numbers."""

from rlhf.sampling.decode import (
    Generation,
    Sampling,
    context_length,
    generate,
    sampling_for,
    stop_token_ids,
    stream,
    uniform_noise,
)
