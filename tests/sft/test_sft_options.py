"""Options of the SFT stage: plain text in the mix, top_p, the batch of all processes, the best
step, where the last two are the reward stage's too.

Left out: long conversations (test_splitting.py) and batch_size on two processes (test_stages.py).
Run: python -m pytest tests/sft/test_sft_options.py
"""

import dataclasses
import json
import os
import random
import signal

import pytest
import torch
from datasets import Dataset
from helpers.rows import write
from helpers.runs import (
    directory_of,
    finish,
    new_run,
    outcome,
    reward_config,
    sft_config,
    start,
    text_of,
    write_rows,
)
from helpers.tiny import tiny_model
from helpers.tokenizers import get_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig, SFTTrainer

from rlhf import train_reward, train_sft
from rlhf.config import InputError, MixConfig, PeftConfig, RewardStageConfig, SFTStageConfig
from rlhf.data import encode_prompt, encode_sft
from rlhf.demo.world import build_tokenizer
from rlhf.demo.world import rows as demo_rows
from rlhf.hf_trainer.arguments import (
    accumulation_steps,
    row_length,
    rows_of_a_pass,
    trainer_arguments,
)
from rlhf.metrics import read_jsonl
from rlhf.sft.stage import sample_responses
from rlhf.sft.training_rows import interleaved, mix_texts

# --- The longest row ------------------------------------------------------------------------------


def test_the_longest_row_is_by_default_what_the_model_takes_and_at_most_1024_tokens():
    config = SFTStageConfig()
    assert [row_length(config, context) for context in (64, 1024, 1 << 30)] == [64, 1024, 1024]
    config.dataset.max_length = 2048
    assert row_length(config, 4096) == 2048
    with pytest.raises(InputError, match="max_length=2048 exceeds the model's context of 64"):
        row_length(config, 64)


def test_a_stage_without_a_longest_row_takes_that_of_the_model(data, tmp_path, capsys):
    config = sft_config(tmp_path, data)
    config.dataset.max_length = None
    config.trainer |= {"max_steps": 1, "packing": True}
    directory = train_sft(config).directory
    shown = capsys.readouterr().out
    assert "; 8 held-out rows; at most 64 tokens a row\n" in shown
    assert "these figures are of only 8 held-out rows and say little; raise dataset." in shown
    reward = reward_config(tmp_path, data, directory)
    reward.dataset.max_length = None
    reward.trainer |= {"max_steps": 1}
    train_reward(reward)
    shown = capsys.readouterr()
    assert "; at most 64 tokens a response\n" in shown.out
    assert "warning: these figures are of only 8 held-out prompts" in shown.err


# --- Samples --------------------------------------------------------------------------------------


def test_samples_are_of_different_prompts_and_a_budget_without_room_is_said(data, tmp_path, capsys):
    config = sft_config(tmp_path, data)
    rows = [row for row in demo_rows("sft", "eval")[:3] for _ in range(4)]
    config.dataset.eval_path = write(tmp_path / "eval.jsonl", rows)
    config.trainer |= {"max_steps": 1}
    assert len({str(sample["prompt"]) for sample in train_sft(config).samples}) == 3
    config.run_name, config.response_length = "long", 64
    assert train_sft(config).samples == []
    warning = "3 of 3 prompts got no sample: response_length=64 leaves them no room in the model's"
    assert warning in capsys.readouterr().err


# --- Plain text in the mix ------------------------------------------------------------------------

NUM_TEXTS = 300


@pytest.fixture
def texts(tmp_path):
    """A file of texts of 1 to 60 words."""
    draw = random.Random(0)
    words = "apple fruit task that response describes an is".split()
    rows = [
        {"text": " ".join(draw.choices(words, k=draw.randint(1, 60)))} for _ in range(NUM_TEXTS)
    ]
    return write(tmp_path / "texts.jsonl", rows)


def encoded_rows(tokenizer, number=200):
    rows = [
        {"prompt": f"Name {i}", "completion": "An apple. " * (1 + i % 5)} for i in range(number)
    ]
    return encode_sft(rows, tokenizer, 512)[0]


def num_tokens(rows):
    return sum(len(row["input_ids"]) for row in rows)


def mixed_rows(texts, fraction, max_length=512, seed=1):
    """Rows, the pieces of text among them, and the line that is printed."""
    tokenizer = get_tokenizer("byte")
    rows = encoded_rows(tokenizer)
    mix = MixConfig(path=texts, fraction=fraction)
    mixed, line = mix_texts(rows, mix, tokenizer, max_length, seed)
    pieces = [row for row in mixed if row not in rows]
    assert mixed == interleaved(rows, pieces)
    return mixed, pieces, line


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_text_has_its_share_of_the_tokens_and_loss_on_every_one(texts, fraction):
    mixed, pieces, line = mixed_rows(texts, fraction)
    assert all(piece["labels"] == piece["input_ids"] for piece in pieces)
    assert 0 <= num_tokens(pieces) - fraction * num_tokens(mixed) < 2
    known = [json.loads(row)["text"] + "<eos>" for row in open(texts)]
    tokenizer = get_tokenizer("byte")
    *whole, last = [tokenizer.decode(piece["input_ids"]) for piece in pieces]
    assert len(set(whole)) == len(whole) and set(whole) <= set(known)
    assert any(text.startswith(last) for text in known if text not in whole)
    share = f"{100 * fraction:.1f} %"
    assert line == f"mixed in {len(pieces)} texts: {share} of {num_tokens(mixed):,} tokens"


def test_texts_are_taken_in_an_order_that_the_seed_decides(texts):
    first, again, other = (mixed_rows(texts, 0.1, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again and first != other


def test_long_texts_become_pieces_of_max_length(tmp_path):
    tokenizer = get_tokenizer("byte")
    path = write(tmp_path / "one.jsonl", [{"text": "xyzxyzxyz"}])
    ids = tokenizer("xyzxyzxyz")["input_ids"] + [tokenizer.eos_token_id]
    assert len(ids) == 10
    rows = [{"input_ids": [7] * 10, "labels": [7] * 10}]
    mix = MixConfig(path=path, fraction=0.5)
    for limit, expected in ((4, [4, 4, 2]), (512, [10])):
        mixed, _ = mix_texts(rows, mix, tokenizer, limit, 1)
        pieces = [row["input_ids"] for row in mixed if row not in rows]
        assert [len(piece) for piece in pieces] == expected
        assert sum(pieces, []) == ids
    with pytest.raises(InputError, match="has 9 in 1 texts"):  # a single token predicts nothing
        mix_texts(rows, mix, tokenizer, 3, 1)


def test_too_little_text_says_how_much_there_is_and_what_that_allows(texts):
    everything = mixed_rows(texts, 0.5)[1]  # more than half of the file, not all of it
    with pytest.raises(InputError) as caught:
        mixed_rows(texts, 0.9)
    message = str(caught.value)
    assert "mix.fraction=0.9 needs " in message and f"in {NUM_TEXTS} texts; set mix." in message
    allowed = float(message.split("at most ")[1].split(",")[0])
    pieces = mixed_rows(texts, allowed)[1]
    assert len(pieces) == NUM_TEXTS > len(everything)
    with pytest.raises(InputError, match="mix.fraction="):
        mixed_rows(texts, allowed + 2e-4)


def test_empty_texts_are_counted(tmp_path):
    path = write(tmp_path / "texts.jsonl", [{"text": "a fruit " * 99}, {"text": " "}])
    line = mixed_rows(path, 0.01)[2]
    line, first = line.splitlines()
    assert line.endswith(" tokens; dropped 1 rows: 1 empty text")
    assert first == f"  first: {path}, row 2: empty text"


def test_pieces_stand_at_equal_distances():
    a, b, c, d, x, y = ({"input_ids": [n], "labels": [n]} for n in range(6))
    assert interleaved([a, b, c, d], [x, y]) == [a, x, b, c, y, d]
    rows = [{"input_ids": [0], "labels": [0]} for _ in range(180)]
    mixed = interleaved(rows, [{"input_ids": [1], "labels": [1]} for _ in range(20)])
    for first in range(200 - 30):  # of 10 in a row 1, and so of 30 about 3
        number = sum(row["input_ids"][0] for row in mixed[first : first + 30])
        assert 2 <= number <= 4


def test_batches_hold_rows_and_text_and_no_loss_on_padding(texts, tmp_path):
    mixed, pieces, _ = mixed_rows(texts, 0.5)
    tokenizer = get_tokenizer("byte")
    args = SFTConfig(str(tmp_path), per_device_train_batch_size=16, report_to="none", use_cpu=True)
    trainer = SFTTrainer(
        tiny_model("llama", tokenizer),
        args,
        train_dataset=Dataset.from_list(mixed),
        processing_class=tokenizer,
    )
    texts_of_batches, known = [], {tuple(piece["input_ids"]) for piece in pieces}
    for batch in trainer.get_train_dataloader():
        real = batch["attention_mask"].bool()
        assert (batch["labels"][~real] == -100).all()
        is_text = []
        for ids, labels, valid in zip(batch["input_ids"], batch["labels"], real, strict=True):
            is_text.append(tuple(ids[valid].tolist()) in known)
            assert not is_text[-1] or torch.equal(labels[valid], ids[valid])
        texts_of_batches.append(sum(is_text))
    assert sum(texts_of_batches) == len(pieces)
    assert all(0 < number < 16 for number in texts_of_batches[:-1])  # random, with these texts


# --- top_p ----------------------------------------------------------------------------------------


def test_top_p_near_zero_samples_the_most_probable_tokens():
    tokenizer = get_tokenizer("byte")
    model = tiny_model("llama", tokenizer)
    rows = [{"prompt": f"Name {i}", "completion": "x"} for i in range(4)]
    config = SFTStageConfig(response_length=12)

    def responses(top_p):
        sampled = sample_responses(model, tokenizer, rows, dataclasses.replace(config, top_p=top_p))
        return [one["response"] for one in sampled]

    greedy = []
    for row in rows:
        ids = encode_prompt(row["prompt"], tokenizer)
        for _ in range(12):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            logits[[tokenizer.pad_token_id]] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        answer = ids[len(encode_prompt(row["prompt"], tokenizer)) :]
        greedy.append(tokenizer.decode(answer, skip_special_tokens=True))
    assert responses(1e-9) == greedy != responses(1.0)


# --- batch_size -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch_size, per_device, processes, steps",
    [(128, 8, 1, 16), (128, 8, 2, 8), (128, 4, 8, 4), (128, 16, 8, 1), (48, 6, 8, 1)],
)
def test_batch_size_is_the_product_of_its_parts(batch_size, per_device, processes, steps):
    assert accumulation_steps(batch_size, per_device * processes) == steps


@pytest.mark.parametrize(
    "batch_size, rows, message",
    [(100, 24, "set it to 96 or 120, or change"), (10, 16, "set it to 16, or change trainer.per")],
)
def test_batch_size_that_is_no_multiple_names_the_nearest_that_are(batch_size, rows, message):
    with pytest.raises(InputError, match=f"batch_size={batch_size} is .* the {rows} .*{message}"):
        accumulation_steps(batch_size, rows)


@pytest.mark.parametrize(
    "factory, config, stage",
    [(SFTConfig, SFTStageConfig(), "sft"), (TrainingArguments, RewardStageConfig(), "reward")],
)
def test_batch_size_sets_the_accumulation_of_this_process(factory, config, stage):
    assert trainer_arguments(factory, config, stage).gradient_accumulation_steps == 1
    config.batch_size, config.trainer["per_device_train_batch_size"] = 24, 3
    assert trainer_arguments(factory, config, stage).gradient_accumulation_steps == 8
    config.batch_size = 25
    with pytest.raises(InputError, match="set it to 24 or 27"):
        trainer_arguments(factory, config, stage)
    config.batch_size = 2
    args = trainer_arguments(factory, config, stage)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 1)


@pytest.mark.parametrize(
    ("batch_size", "per_device", "processes", "rows"),
    [(64, 8, 1, 8), (64, 8, 8, 8), (32, 8, 8, 4), (8, 8, 8, 1), (4, 8, 8, 8), (30, 8, 8, 8)],
)
def test_a_pass_has_no_more_rows_than_a_process_has_of_a_batch(
    batch_size, per_device, processes, rows
):
    assert rows_of_a_pass(batch_size, per_device, processes) == rows


# --- The best step --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few rows of the demo, conversations of eight rounds (about 100 tokens), and texts."""
    folder = tmp_path_factory.mktemp("data")
    for stage in ("sft", "reward"):
        for split, number in (("train", 40), ("eval", 8)):
            write_rows(folder / f"{stage}_{split}.jsonl", demo_rows(stage, split)[:number])
    rounds = [row["messages"] for row in demo_rows("sft", "train")[:160]]
    long = [{"messages": sum(rounds[i : i + 8], [])} for i in range(0, 160, 8)]
    write_rows(folder / "long.jsonl", long)
    write_rows(folder / "texts.jsonl", [{"text": m[1]["content"]} for m in rounds])
    return folder


def overfitting(runs, data, **trainer):
    """An SFT run whose held-out loss is lowest in the middle, at step 10 of 14."""
    config = sft_config(runs, data)
    config.trainer |= {"learning_rate": 3e-2, "lr_scheduler_type": "constant", "eval_steps": 2}
    config.trainer |= {"load_best_model_at_end": True} | trainer
    config.checkpoint.keep_last = 1
    return config


def evaluations(directory, name="eval_loss"):
    rows = [row for row in read_jsonl(directory / "metrics.jsonl") if name in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row[name] for row in rows}


def loss_of(final, data):
    """Held-out loss of a directory, by hand: the mean over the answers' tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final).eval(), build_tokenizer()
    rows = [json.loads(line) for line in open(data / "sft_eval.jsonl")]
    tokenizer.chat_template = (final / "chat_template.jinja").read_text()
    losses = []
    for row in encode_sft(rows, tokenizer, 64)[0]:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0]
        labels = torch.tensor(row["labels"])[1:]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="none"))
        losses[-1] = losses[-1][labels != -100]
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("peft", [PeftConfig(), PeftConfig(enabled=True, r=8, dropout=0.1)])
def test_final_is_from_the_evaluation_with_the_least_loss(peft, data, tmp_path, capsys):
    config = dataclasses.replace(overfitting(tmp_path, data), peft=peft)
    result = train_sft(config)
    losses = evaluations(tmp_path / "run/sft")
    best = min(losses, key=losses.__getitem__)
    assert list(losses) == [2, 4, 6, 8, 10, 12, 14] and 2 < best < 14
    assert result.after["eval_loss"] == losses[best]
    assert loss_of(result.directory, data) == pytest.approx(losses[best], rel=1e-5)
    assert f"taking step {best} of 14, with the best eval_loss: " in capsys.readouterr().out
    if not peft.enabled:
        assert_same_weights(tmp_path / f"run/sft/checkpoint-{best}", result.directory)


def assert_same_weights(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_last_step_may_be_the_best(data, tmp_path):
    result = train_sft(overfitting(tmp_path, data, learning_rate=1e-3))
    losses = evaluations(tmp_path / "run/sft")
    assert min(losses, key=losses.__getitem__) == 14
    assert result.after["eval_loss"] == losses[14]
    assert loss_of(result.directory, data) == pytest.approx(losses[14], rel=1e-5)
    assert_same_weights(tmp_path / "run/sft/checkpoint-14", result.directory)


def test_a_reward_model_is_from_its_best_evaluation(data, tmp_path):
    train_sft(sft_config(tmp_path, data))
    config = reward_config(tmp_path, data, tmp_path / "run/sft/final")
    config.trainer |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_margin"}
    config.trainer |= {"eval_steps": 1, "learning_rate": 0.1}
    result = train_reward(config)
    margins = evaluations(tmp_path / "run/reward", "eval_margin")
    best = max(margins, key=margins.__getitem__)
    assert 1 < best < max(margins)
    assert result.after["eval_margin"] == pytest.approx(margins[best], rel=1e-5)


@pytest.mark.parametrize(
    "trainer, message",
    [
        ({"metric_for_best_model": "eval_los"}, "must be one of eval_loss, eval_mean_token_acc"),
        ({"eval_strategy": "no"}, "needs evaluations, but trainer.eval_strategy=no; set"),
    ],
)
def test_what_the_best_step_needs_is_checked_before_anything_loads(
    trainer, message, data, tmp_path
):
    with pytest.raises(InputError, match=message):
        train_sft(overfitting(tmp_path, data, **trainer))
    assert not (tmp_path / "run").exists()


def test_an_epoch_is_evaluated_before_the_checkpoint_of_its_last_step(data, tmp_path):
    config = sft_config(tmp_path, data)
    config.trainer |= {"eval_strategy": "epoch", "max_steps": 7}
    config.checkpoint.every = 5  # an epoch
    train_sft(config)
    assert list(evaluations(tmp_path / "run/sft")) == [5, 7]
    manifest = json.loads((tmp_path / "run/sft/checkpoint-5/manifest.json").read_text())
    before = (tmp_path / "run/sft/metrics.jsonl").read_text()[: manifest["logs"]["metrics.jsonl"]]
    assert '"eval_loss"' in before


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_killed_runs_with_every_option_end_as_if_they_had_never_stopped(strategy, data, tmp_path):
    config = overfitting(tmp_path / "whole", data, eval_strategy=strategy)
    config.trainer |= {"gradient_accumulation_steps": 1}
    config.batch_size = 8
    config.mix = MixConfig(path=str(data / "texts.jsonl"), fraction=0.2)
    config.dataset.path, config.dataset.split_long = str(data / "long.jsonl"), True
    # an epoch has 18 steps; the last also writes a checkpoint
    in_epochs = {"max_steps": -1, "num_train_epochs": 2}
    config.trainer |= {"max_steps": 36} if strategy == "steps" else in_epochs
    config.checkpoint.every = 3
    finish(start(config), config)
    whole, log = outcome(config), text_of(config)
    assert "split 20 conversations longer than dataset.max_length=64 tokens into" in log
    assert "; 8 held-out rows; at most 64 tokens a row\n" in log  # neither split nor mixed
    assert "mixed in" in log and ": 20.0 % of" in log
    losses = evaluations(tmp_path / "whole/run/sft")
    best = min(losses, key=losses.__getitem__)
    assert f"taking step {best} of" in log and best < max(losses)
    num_accesses = int(log.split("accesses=")[-1])
    for i, share in enumerate((0.3, 0.6, 0.95)):
        again = new_run(config, tmp_path / "killed", f"run-{i}")
        process = start(again, kill_at=int(share * num_accesses))
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        if share == 0.95:  # the best checkpoint is found where the run is now
            os.rename(directory_of(again).parent, tmp_path / "killed/moved")
            again = new_run(config, tmp_path / "killed", "moved")
        finish(start(again), again)
        assert "resuming from" in text_of(again)
        assert outcome(again) == whole
