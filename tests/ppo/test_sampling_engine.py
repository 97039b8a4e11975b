"""`sampling.*` in a PPO run: which engine is chosen, what the run says, and equal results.

Run: pytest tests/ppo/test_sampling_engine.py
"""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tiny_ppo import make_config, write_policy
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf import train_ppo
from rlhf.config import InputError, PeftConfig, SamplingConfig
from rlhf.engine_choice import choose_engine
from rlhf.metrics import TIMINGS, read_jsonl
from rlhf.sampling import engine_of

TOKENIZER = tiny_tokenizer()


def run(folder, sampling, lora=False, **ppo):
    folder.mkdir()
    config = make_config(write_policy(folder / "policy"), folder, num_updates=2, **ppo)
    config.sampling = sampling
    config.peft = PeftConfig(enabled=lora, r=4, alpha=8)
    train_ppo(config)
    directory = config.stage_dir("ppo")
    record = json.loads((directory / "final" / "rlhf.json").read_text())
    return read_jsonl(directory / "metrics.jsonl"), record["sampling"]


def test_a_run_with_graph_has_the_metrics_of_one_with_loop(tmp_path, capsys):
    loop, said = run(tmp_path / "loop", SamplingConfig(), samples_per_prompt=2)
    assert said == "loop, because sampling.engine=auto takes it on a CPU"
    assert f"sampling: {said}" in capsys.readouterr().out
    chosen = SamplingConfig(engine="graph", check_every=3)
    graph, said = run(tmp_path / "graph", chosen, samples_per_prompt=2)
    assert said == "graph, without CUDA graphs, because the policy is on a CPU"
    assert f"sampling: {said}" in capsys.readouterr().out
    for mine, theirs in zip(graph, loop, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - TIMINGS - {"sampler_gap"}:
            assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["loop", "graph"])
def test_a_copy_in_bfloat16_shows_in_the_sampler_gap(engine, tmp_path):
    chosen = SamplingConfig(engine=engine, dtype="bfloat16")
    rows, said = run(tmp_path / "run", chosen, lora=True)
    assert said.startswith(engine) and said.endswith("by a copy of the policy in bfloat16")
    gaps = [row["sampler_gap"] for row in rows if "sampler_gap" in row]
    assert len(gaps) == 2 and all(1e-4 < gap < 1 for gap in gaps)


def test_a_family_that_cannot_is_refused_when_asked_for_by_hand():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320, "state_size": 4}
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).eval()
    with pytest.raises(InputError) as error:
        choose_engine(mamba, TOKENIZER, "graph", "sampling.engine")
    assert str(error.value) == (
        "sampling.engine=graph: MambaForCausalLM cannot sample so, because its cache has layers of "
        "another kind (LinearAttentionLayer); set sampling.engine=auto"
    )
    assert choose_engine(mamba, TOKENIZER).startswith("loop, because engine=auto")


def test_what_does_not_sample_what_the_model_predicts_falls_back_to_the_loop(monkeypatch):
    model = tiny_model("llama", TOKENIZER)
    monkeypatch.setattr("rlhf.sampling.engine.copy_weights", lambda model, plain: None)
    said = choose_engine(model, TOKENIZER, dtype=torch.float32)
    assert said.startswith(
        "loop, because what it samples is not what the model predicts (log-probs"
    )
    assert engine_of(model).name == "loop" and engine_of(model).copy is None


@pytest.mark.parametrize("wrong", [float("nan"), 3.0])
def test_a_wrong_graph_is_found(wrong, monkeypatch):
    import rlhf.sampling.graph

    right = rlhf.sampling.graph.choose

    def choose(logits, sampling, forbidden, draws):
        return right(logits * wrong, sampling, forbidden, draws)

    monkeypatch.setattr("rlhf.sampling.graph.choose", choose)
    with pytest.raises(InputError, match="sampling.engine=graph: LlamaForCausalLM cannot sample"):
        choose_engine(tiny_model("llama", TOKENIZER), TOKENIZER, "graph", "sampling.engine")
