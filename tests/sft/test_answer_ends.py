"""SFT where the chat template ends answers with a token other than EOS, or rewrites turns."""

from __future__ import annotations

import json
import re

import pytest
from helpers.templates import DIALOGUE, marked
from helpers.tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf import train_sft
from rlhf.config import DatasetConfig, ModelConfig, SFTStageConfig
from rlhf.data import encode_samples, encode_sft
from rlhf.sampling import stop_token_ids


def rows(path, number=12, **row):
    row = row or {"messages": DIALOGUE[:4]}
    path.write_text(
        "".join(json.dumps(row).replace("fruit", f"fruit {i}") + "\n" for i in range(number))
    )
    return str(path)


def sft_config(folder, template, marks="special", row=None, **model):
    tokenizer = marked(template, marks)
    tokenizer.save_pretrained(folder / "base")
    tiny_model("llama", tokenizer, max_position_embeddings=512).save_pretrained(folder / "base")
    config = SFTStageConfig(
        runs_dir=str(folder / "runs"),
        model=ModelConfig(path=str(folder / "base"), **model),
        dataset=DatasetConfig(
            rows(folder / "rows.jsonl", **(row or {})), max_length=300, eval_fraction=0.3
        ),
        num_samples=1,
        response_length=4,
    )
    if row:
        config.dataset.format = "prompt_completion"
    config.trainer |= {"max_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1}
    return config


def test_sft_makes_the_turns_end_the_eos_of_all_that_it_saves(tmp_path, capsys):
    result = train_sft(sft_config(tmp_path, "chatml"))
    said = "EOS is <|im_end|> instead of <eos>, because the chat template ends every answer with it"
    assert said in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(result.directory)
    model = AutoModelForCausalLM.from_pretrained(result.directory)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == end
    assert json.loads((result.directory / "rlhf.json").read_text())["eos_token_id"] == end
    assert stop_token_ids(model, tokenizer) == (end,)


def test_sft_on_text_keeps_the_eos_that_the_model_knows(tmp_path, capsys):
    config = sft_config(tmp_path, "chatml", row={"prompt": "a fruit", "completion": " apple"})
    result = train_sft(config)
    assert AutoTokenizer.from_pretrained(result.directory).eos_token == "<eos>"
    assert "EOS is" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "marks, model, warning",
    [
        (
            "text",
            {},
            "the chat template ends every answer with '<|im_end|>', which is not a single token; "
            "EOS (<eos>) follows after the last answer of a row. To make it the EOS, set "
            "model.special_tokens=['<|im_end|>'] model.eos_token='<|im_end|>'",
        ),
        (
            "special",
            {"eos_token": "<bos>"},
            "model.eos_token='<bos>', but the chat template ends every answer with '<|im_end|>', "
            "and the model learns to end with that; set model.eos_token=null",
        ),
    ],
)
def test_sft_warns_of_an_end_that_is_not_eos_with_the_remedy(
    tmp_path, capsys, marks, model, warning
):
    from rlhf.sft.stage import load_sft_tokenizer

    config = sft_config(tmp_path, "chatml", marks, **model)
    tokenizer = load_sft_tokenizer(config.model, "conversation")
    assert warning in capsys.readouterr().err
    assert tokenizer.eos_token == model.get("eos_token", "<eos>")
    remedy = ModelConfig(config.model.path, special_tokens=["<|im_end|>"], eos_token="<|im_end|>")
    assert load_sft_tokenizer(remedy, "conversation").eos_token == "<|im_end|>"
    assert capsys.readouterr().err == ""


def test_sft_trains_on_rewritten_conversations_and_says_how_many_sequences(tmp_path, capsys):
    config = sft_config(tmp_path, "thinking")
    config.dataset.split_long = True
    train_sft(config)
    printed = capsys.readouterr().out
    said = re.search(r"(\d+) training rows become (\d+) sequences: the chat template", printed)
    assert said and int(said[2]) == 2 * int(said[1]) > 0
    rows = [{"messages": DIALOGUE}] * 3
    tokenizer = marked("thinking")
    lengths = [len(ids) for ids, _ in encode_samples(rows[0], tokenizer)]
    encoded, dropped = encode_sft(rows, tokenizer, lengths[1])
    assert len(encoded) == 6 and sum(dropped.values()) == 3
