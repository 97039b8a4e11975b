"""Train a byte-level BPE on the text of an Alpaca-format JSONL file.

python examples/alpaca_eval/make_tokenizer.py DATA.jsonl OUT_DIR VOCAB_SIZE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def texts(path: str) -> Iterator[str]:
    """Yield every instruction, input and output of the file."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield from (row[key] for key in ("instruction", "input", "output") if row[key])


def main(path: str, out_dir: str, vocab_size: int) -> None:
    """Train and save the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(path), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>"
    ).save_pretrained(out_dir)
    print(f"{tokenizer.get_vocab_size()} tokens -> {out_dir}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
