"""LoRA trains the rows of new tokens next to its adapters: in every family, in each stage, through
checkpoints, and into the merged model.

Run: pytest tests/models/test_new_tokens.py
"""

import dataclasses
import json

import pytest
import torch
from helpers.checkpoints import take_back_end
from helpers.families import (
    LORA,
    PROMPTS,
    RESPONSES,
    TOKENIZER,
    VOCAB,
    close,
    exact,
    logits_of,
    rollout_of,
)
from helpers.tiny import FAMILIES, tiny_model, tiny_tokenizer
from helpers.tiny_ppo import make_config, write_policy

from rlhf import train_ppo, train_reward, train_sft
from rlhf.config import (
    DatasetConfig,
    InputError,
    ModelConfig,
    PeftConfig,
    RewardStageConfig,
    SFTStageConfig,
    check,
)
from rlhf.export import ExportOptions, export
from rlhf.metrics import read_jsonl
from rlhf.models import add_lora, load_policy, merged, new_token_rows, resize_embeddings
from rlhf.ppo.rollout import policy_logprobs
from rlhf.sampling import Sampling
from rlhf.sft.stage import _trained_token_rows
from rlhf.tokenizer import load_tokenizer

ROWS = [VOCAB, VOCAB + 1]  # of two tokens that the tokenizer of the tiny models does not have
IDS = [40, VOCAB, 42, VOCAB + 1, 44]
END = "<|im_end|>"
CHATML = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>{% endif %}"


def with_rows(family, tied=False, task_type="CAUSAL_LM"):
    """A model, and the same with adapters and two new rows that are trained."""
    models = [tiny_model(family, TOKENIZER, tie_word_embeddings=tied) for _ in range(2)]
    for model in models:
        resize_embeddings(model, VOCAB + 2)
    return models[0], add_lora(models[1], LORA, task_type, seed=0, token_rows=ROWS)


def train(model, num_steps=3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    ids = torch.tensor([IDS])
    for _ in range(num_steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def tables(model):
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


# --- Every family ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_trained_go_off_with_the_adapters_and_are_merged(family, tied):
    base, live = with_rows(family, tied)
    reference = logits_of(base, IDS)
    exact(logits_of(live, IDS), reference)
    train(live)
    trained = logits_of(live, IDS)
    assert (trained - reference).abs().max() > 0.1
    with live.disable_adapter():
        exact(logits_of(live, IDS), reference)
    plain = merged(live).eval()
    close(logits_of(plain, IDS), trained, atol=1e-4)
    for old, new in zip(tables(base), tables(plain), strict=True):
        exact(new[:VOCAB], old[:VOCAB])
        assert (new[VOCAB] - new[VOCAB + 1]).abs().max() > 0.01  # they can be told apart
    assert (tables(plain)[0] is tables(plain)[1]) == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_to_the_reference_is_exactly_0_before_training(family):
    _, live = with_rows(family)
    part = rollout_of(PROMPTS, [[*response, VOCAB] for response in RESPONSES])
    sampling = Sampling(8, (VOCAB,), torch.tensor([0]))
    with_adapters, _ = policy_logprobs(live, part, sampling)  # with gradients, as in an update
    with torch.no_grad(), live.disable_adapter():
        reference, _ = policy_logprobs(live, part, sampling)
    exact(with_adapters.detach(), reference)


# --- Which rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "knob", "rows"),
    [
        ({"eos_token": END}, "auto", True),
        ({"stop_strings": [END]}, "auto", True),
        ({"chat_template": CHATML}, "auto", True),
        ({}, "auto", False),
        ({}, True, True),
        ({"eos_token": END}, False, False),
    ],
)
def test_rows_of_new_tokens_are_trained_where_one_is_used(changes, knob, rows, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    changes = {"pad_token": "<|new_pad|>"} | changes  # never seen by the model
    tokens = ["<|im_start|>", END, "<|new_pad|>"]
    config = ModelConfig(str(tmp_path), special_tokens=tokens, **changes)
    peft = PeftConfig(enabled=True, train_new_tokens=knob)
    assert new_token_rows(load_tokenizer(config), config, peft) == (ROWS if rows else [])


def test_train_new_tokens_is_checked():
    config = SFTStageConfig(peft=PeftConfig(enabled=True, train_new_tokens="maybe"))
    config.model.path, config.dataset.path = "some/model", "rows.jsonl"
    with pytest.raises(InputError, match="peft.train_new_tokens must be one of true, false, auto"):
        check(config)


def test_sft_refuses_rows_in_slices_of_zero3(tmp_path, monkeypatch):
    tiny_tokenizer().save_pretrained(tmp_path)
    config = SFTStageConfig(peft=PeftConfig(enabled=True, train_new_tokens=True))
    config.model = ModelConfig(str(tmp_path), special_tokens=[END])
    tokenizer = load_tokenizer(config.model)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert _trained_token_rows(config, tokenizer) == ROWS[:1]  # ZeRO-2
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(InputError, match="peft.train_new_tokens=True: SFT cannot train the rows"):
        _trained_token_rows(config, tokenizer)


# --- The stages -----------------------------------------------------------------------------------


def model_config(folder, **changes):
    tokenizer = tiny_tokenizer()
    tiny_model("llama", tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return ModelConfig(
        str(folder / "model"),
        special_tokens=["<|im_start|>", END],
        eos_token=END,
        chat_template=CHATML,
        **changes,
    )


def sft_config(folder, **changes):
    rows = []
    for i in range(16):
        turns = [("user", f"Hi {i}"), ("assistant", "Yo")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SFTStageConfig(
        runs_dir=str(folder / "runs"),
        model=model_config(folder, **changes),
        peft=PeftConfig(enabled=True, r=4),
        dataset=DatasetConfig(str(folder / "rows.jsonl"), max_length=60, eval_fraction=0.2),
        num_samples=2,
        response_length=6,
    )
    config.trainer |= {"learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 4}
    config.checkpoint.every = 2
    return config


def test_sft_resumes_and_exports_the_trained_rows(tmp_path, capsys):
    config = sft_config(tmp_path)
    final = train_sft(config).directory
    assert "keep the mean of the old rows" not in capsys.readouterr().err
    expected = dict(load_policy(ModelConfig(str(final)), load_tokenizer(config.model)).state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        first, second = expected[name][VOCAB : VOCAB + 2]
        assert (first - second).abs().max() > 0.01
    stage = final.parent
    take_back_end(final.parent)
    train_sft(dataclasses.replace(config, resume=True))
    tokenizer = load_tokenizer(ModelConfig(str(final)))
    exact(dict(load_policy(ModelConfig(str(final)), tokenizer).state_dict()), expected)
    export(ExportOptions(str(stage / "checkpoint-4"), str(tmp_path / "plain")))
    exported = load_policy(ModelConfig(str(tmp_path / "plain")), tokenizer)
    rows = exported.lm_head.weight[VOCAB : VOCAB + 2]
    assert (rows[0] - rows[1]).abs().max() > 0.01
    assert (rows - expected["lm_head.weight"][VOCAB : VOCAB + 2]).abs().max() < 0.1


def test_sft_trains_the_rows_over_a_quantised_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    final = train_sft(sft_config(tmp_path, quantization="8bit")).directory
    model = load_policy(ModelConfig(str(final)), load_tokenizer(ModelConfig(str(final))))
    for table in tables(model):
        assert (table[VOCAB] - table[VOCAB + 1]).abs().max() > 0.01


def test_a_reward_model_learns_the_rows(tmp_path):
    rows = tmp_path / "ranked.jsonl"
    row = '{{"prompt": "Fruit {0}?", "responses": [" An apple.", " A car."], "ranks": [0, 1]}}\n'
    rows.write_text("".join(row.format(i) for i in range(12)))
    dataset = DatasetConfig(str(rows), format="ranked", max_length=100, eval_fraction=0.3)
    config = RewardStageConfig(
        runs_dir=str(tmp_path / "runs"),
        model=model_config(tmp_path),
        peft=PeftConfig(enabled=True, r=4),
        dataset=dataset,
    )
    config.trainer |= {"max_steps": 3, "learning_rate": 1e-2}
    final = train_reward(config).directory
    from rlhf.models import load_reward_model

    table = load_reward_model(ModelConfig(str(final))).get_input_embeddings().weight
    assert (table[VOCAB] - table[VOCAB + 1]).abs().max() > 0.01


def how_far_rows_moved(model):
    """From the mean of the old rows, where they started, in the output table."""
    table = model.lm_head.weight
    return (table[VOCAB : VOCAB + 2] - table[:VOCAB].mean(dim=0)).abs().max()


def test_ppo_starts_at_the_reference_learns_the_rows_and_resumes(tmp_path):
    config = make_config(write_policy(tmp_path / "policy"), tmp_path, num_updates=3)
    config.model = model_config(tmp_path)
    config.peft = PeftConfig(enabled=True, r=4)
    config.evaluation.select = "last"
    final = train_ppo(config).directory
    metrics = [row for row in read_jsonl(final.parent / "metrics.jsonl") if "kl" in row]
    assert metrics[0]["kl"] == 0 and metrics[-1]["kl"] != 0
    expected = (final / "model.safetensors").read_bytes()
    tokenizer = load_tokenizer(ModelConfig(str(final)))
    assert how_far_rows_moved(load_policy(ModelConfig(str(final)), tokenizer)) > 1e-4
    take_back_end(final.parent)
    train_ppo(dataclasses.replace(config, resume=True))
    assert (final / "model.safetensors").read_bytes() == expected
    export(ExportOptions(str(final.parent / "checkpoint-2"), str(tmp_path / "plain")))
    assert how_far_rows_moved(load_policy(ModelConfig(str(tmp_path / "plain")), tokenizer)) > 1e-4
