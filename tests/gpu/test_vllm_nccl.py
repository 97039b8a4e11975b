"""Weights that go from GPU to GPU to a vLLM server, by TRL's client: not run yet. The requests of
that client are tested in tests/sampling/test_vllm_weights.py.

Needs two GPUs and vLLM in the environment of the tests. Run: pytest tests/gpu/test_vllm_nccl.py -m
gpu
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer

from rlhf.config import SamplingConfig
from rlhf.engine_choice import choose_server
from rlhf.equivalence import cache_deviation
from rlhf.sampling import VLLM, engine_of

TOKENIZER = tiny_tokenizer()
SIZES = {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}


@pytest.mark.gpu
def test_the_server_samples_by_the_weights_that_nccl_brought(monkeypatch):
    if torch.cuda.device_count() < 2 or find_spec("vllm") is None:
        pytest.skip("needs two GPUs, and vLLM in this environment")
    policy = tiny_model("llama", TOKENIZER, **SIZES).to("cuda:0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # of the server; NCCL wants a GPU for each side
    arguments = ["--enforce-eager", "--gpu-memory-utilization", "0.2"]
    server = VLLM(
        SamplingConfig("vllm", vllm_python=sys.executable, vllm_args=arguments, weights="nccl")
    )
    try:
        print(choose_server(policy, TOKENIZER, server, None))
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.2)
        engine_of(policy).refresh()
        assert cache_deviation(policy, TOKENIZER, 3) < 1e-3
    finally:
        server.close()
