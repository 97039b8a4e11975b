"""The folder of a new user: a small chat model that knows a few words, and files of the user's."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch

THINGS = """apple river stone cloud table lamp horse train piano garden winter bread ship glass
letter bridge forest clock window pencil""".split()
OPINIONS = "small old warm quiet useful".split()


def answer(i: int, long: bool = False) -> str:
    more = f" It is {OPINIONS[i % 5]} and I like it." if long else ""
    return f"A {THINGS[i]} is a thing.{more}"


def write_folder(folder: Path) -> None:
    """Write `model/` and the user's files, whose column names are the user's own."""
    with (folder / "faq.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "query", "reply"])
        for i, thing in enumerate(THINGS):
            writer.writerow([i, f"What is a {thing}?", answer(i)])
            writer.writerow([100 + i, f"Tell me of a {thing}.", answer(i, long=True)])
    votes = [
        {"question": f"What is a {thing}?", "better": answer(i, long=i % 2 > 0), "worse": "No."}
        for i, thing in enumerate(THINGS)
    ]
    questions = [
        {"question": f"{start} a {thing}{end}", "topic": thing}
        for start, end in (("What is", "?"), ("Tell me of", "."))
        for thing in THINGS
    ]
    for name, rows in {"votes": votes, "questions": questions}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_model(folder / "model", [answer(i, long) for i in range(20) for long in (False, True)])


def write_model(directory: Path, answers: list[str]) -> None:
    """A Llama of 60,000 parameters with a chat template that half knows the answers."""
    tokenizer = word_tokenizer(answers)
    model = tiny_llama(tokenizer)
    rows = []
    for i, text in enumerate(answers):
        question = f"What is a {THINGS[i // 2]}?"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        rows.append(tokenizer.apply_chat_template(messages, tokenize=False))
    batch = tokenizer(rows, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def word_tokenizer(texts: list[str]) -> Any:
    """One id for each word and sign of the texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = pre_tokenizers.Split(Regex(r" ?\w+|\W"), "isolated")
    words = ["<unk>", "<pad>", "<bos>", "<eos>"]
    talk = ["User: What is a", "User: Tell me of a", "\nAssistant: No. A", "What Tell A No"]
    talk += [f" {thing}?" for thing in THINGS]
    for text in [*talk, *texts]:
        for piece, _ in pieces.pre_tokenize_str(text):
            words += [piece, piece.strip(" ") or piece]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pieces, decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    )
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ 'User: ' if m.role == 'user' else 'Assistant: ' }}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )
    return tokenizer


def tiny_llama(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)
