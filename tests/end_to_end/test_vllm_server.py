"""PPO through a real vLLM server on the CPU, of the version that `make test-vllm` installs.

Three updates reach the scores of `loop`, with the weights as files and as a LoRA adapter alone;
every update's gap is that of rounding, and a run whose server was killed continues.
`tests/sampling/test_vllm.py` tests the same engine without vLLM.

Run: make test-vllm
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.families import LORA
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tiny_ppo import make_config

from rlhf import PPOTrainer, train_ppo
from rlhf.config import InputError, PeftConfig, SamplingConfig
from rlhf.engine_choice import choose_server
from rlhf.metrics import read_jsonl
from rlhf.models import add_lora
from rlhf.models.stacked import keep_apart
from rlhf.sampling import VLLM, Sampling, engine_of, generate, uniform_noise, use_engine
from rlhf.tokenizer import StopStrings, declare_stop_strings, forbidden_token_ids
from rlhf.vllm_server import ServerProcess

PYTHON = os.environ.get("RLHF_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs RLHF_VLLM_PYTHON: run make test-vllm"),
]
TOKENIZER = tiny_tokenizer()
QUICK = ["--enforce-eager"]
PROMPTS = [[40, 41, 42], [50], [60, 61], [60, 61], [60, 61], [70, 71, 72, 73]]
BUDGET = 12
STOPS = tuple(range(3, 320, 24))
NOISE = uniform_noise((3,), range(6), BUDGET)


def make_policy():
    """A tiny Llama with a head of 64 numbers: vLLM has no attention on a CPU for small ones."""
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    model = tiny_model("llama", TOKENIZER, **sizes)
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *range(10, 320, 20)]
    return model


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "policy"
    make_policy().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(policy):
    arguments = ["--enable-lora", "--max-lora-rank", "8", *QUICK]
    process = ServerProcess(PYTHON, policy, "float32", arguments)
    process.wait()
    yield process.url
    process.stop()


def shift(model):
    """Move the adapters of a model, which add nothing at first."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def sampling_for(model, stop_ids=STOPS, **knobs):
    forbidden = forbidden_token_ids(TOKENIZER, model.config.vocab_size)
    return Sampling(BUDGET, tuple(stop_ids), forbidden, **knobs)


def assert_logprobs(model, made, sampling):
    for prompt, ids, logprobs in zip(PROMPTS, made.ids, made.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        logits[:, sampling.forbidden] = -torch.inf
        expected = (logits / sampling.temperature).log_softmax(-1)
        expected = expected.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=1e-4, atol=1e-4)


def test_it_samples_what_every_engine_must(url):
    model, tokenizer = make_policy(), tiny_tokenizer()
    free = generate(model, PROMPTS, sampling_for(model, (-1,)), None)
    text = tokenizer.decode(free.ids[0][4:5])
    tokenizer.chat_template = declare_stop_strings("{{ messages }}", [text])
    likeliest = [
        sampling_for(model),
        sampling_for(model, (free.ids[0][2], free.ids[5][4])),
        sampling_for(model, (-1,), stop_strings=StopStrings(tokenizer)),
    ]
    expected = [generate(model, PROMPTS, sampling, None) for sampling in likeliest]
    client = VLLM(SamplingConfig(engine="vllm", url=url))
    client.begin(model, TOKENIZER, torch.float32)
    engine = use_engine(model, "vllm", server=client)
    engine.refresh()
    for sampling, theirs in zip(likeliest, expected, strict=True):
        mine = generate(model, PROMPTS, sampling, None)
        assert mine.ids == theirs.ids and mine.finished == theirs.finished
    for scale in (1.0, 1.1):  # the weights change: so do those of the server
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        engine.refresh()
        sampling = sampling_for(model, temperature=1.3)
        made = generate(model, PROMPTS, sampling, NOISE)
        assert_logprobs(model, made, sampling)
        assert made.finished == [row[-1] in STOPS for row in made.ids]
        assert len({*map(tuple, made.ids[2:5])}) > 1  # one prompt, three seeds
        assert generate(model, PROMPTS, sampling, NOISE).ids == made.ids
    client.close()


def config_for(policy, folder, name, sampling):
    knobs = {"batch_size": 128, "micro_batch_size": 64, "response_length": 16}
    folder.mkdir(exist_ok=True)
    config = make_config(policy, folder, num_updates=3, learning_rate=3e-4, **knobs)
    config.run_name, config.sampling, config.checkpoint.every = name, sampling, 1
    config.evaluation.num_prompts = 0
    return config


def rows_of(config):
    return read_jsonl(config.stage_dir("ppo") / "metrics.jsonl")


def test_three_updates_reach_the_scores_of_the_loop(policy, url, tmp_path):
    results = {}
    for engine in ("loop", "vllm"):
        sampling = SamplingConfig(engine=engine, url=url if engine == "vllm" else None)
        config = config_for(policy, tmp_path, engine, sampling)
        train_ppo(config)
        results[engine] = rows_of(config)
    for loop, vllm in zip(results["loop"], results["vllm"], strict=True):
        error = ((loop["score_std"] ** 2 + vllm["score_std"] ** 2) / 128) ** 0.5
        print({k: (loop[k], vllm[k]) for k in ("score", "kl", "sampler_gap")}, f"{error=:.3f}")
        assert abs(loop["score"] - vllm["score"]) < 4 * error
        assert vllm["sampler_gap"] < 1e-3
        assert loop["score"] != vllm["score"]  # other tokens


def test_three_updates_with_the_adapter_alone_reach_the_scores_of_the_loop(policy, url, tmp_path):
    """The server has the weights of the test before; its base is replaced."""
    results = {}
    for engine in ("loop", "vllm"):
        sampling = SamplingConfig(engine=engine, url=url if engine == "vllm" else None)
        config = config_for(policy, tmp_path, f"adapter-{engine}", sampling)
        config.peft, config.ppo.learning_rate = PeftConfig(enabled=True, r=4), 3e-3
        config.ppo.share_base = engine == "vllm"
        train_ppo(config)
        results[engine] = rows_of(config)
    record = json.loads((config.stage_dir("ppo") / "final/rlhf.json").read_text())
    assert "(weights as adapter: 0." in record["sampling"]
    for loop, vllm in zip(results["loop"], results["vllm"], strict=True):
        error = ((loop["score_std"] ** 2 + vllm["score_std"] ** 2) / 128) ** 0.5
        print({k: (loop[k], vllm[k]) for k in ("score", "kl", "sampler_gap")}, f"{error=:.3f}")
        assert abs(loop["score"] - vllm["score"]) < 4 * error
        assert vllm["sampler_gap"] < 1e-3
    assert results["vllm"][-1]["kl"] > 1e-3  # it has moved away from its base


def test_the_server_samples_by_an_adapter_on_a_stacked_base(url):
    lower = shift(add_lora(make_policy(), LORA, "CAUSAL_LM", 0))
    model = shift(add_lora(keep_apart(lower, "the adapter of SFT"), LORA, "CAUSAL_LM", 1))
    client = VLLM(SamplingConfig(engine="vllm", url=url, weights="adapter"))
    print(choose_server(model, TOKENIZER, client, None))
    sampling = sampling_for(model)
    for _ in range(2):
        shift(model)
        engine_of(model).refresh()
        assert_logprobs(model, generate(model, PROMPTS, sampling, NOISE), sampling)
    client.close()


def test_a_run_whose_server_was_killed_continues(policy, tmp_path, monkeypatch):
    shutil.copytree(policy, tmp_path / "policy")
    sampling = SamplingConfig(engine="vllm", vllm_python=PYTHON, vllm_args=QUICK)
    config = config_for(tmp_path / "policy", tmp_path / "run", "killed", sampling)
    step = PPOTrainer.step

    def kill(self):
        if self.update == 1:
            server = engine_of(self.actors.policy).server
            os.killpg(server._process._process.pid, signal.SIGKILL)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "step", kill)
        with pytest.raises(InputError) as error:
            train_ppo(config)
    print(error.value)
    assert "ended with status -9" in str(error.value)
    assert "update 1 is saved in" in str(error.value)
    train_ppo(dataclasses.replace(config, resume=True))
    rows = rows_of(config)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["sampler_gap"] < 1e-3 for row in rows)
