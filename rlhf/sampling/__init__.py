"""Sampling responses from a policy: `generate`, with its settings and its random numbers."""

from rlhf.sampling.cache import room_of, roomy_cache
from rlhf.sampling.engine import CHECK_EVERY, engine_of, generate, stream, use_engine
from rlhf.sampling.settings import (
    Generation,
    Sampling,
    context_length,
    sampling_for,
    stop_token_ids,
    uniform_noise,
)
from rlhf.sampling.vllm import VLLM
