"""Tiny tokenizers for tests, built offline."""

from typing import Any

CORPUS = [
    "### User:\nName a fruit.\n\n### Assistant:\nAn apple is a fruit.",
    "Below is an instruction that describes a task. Write a response.",
]


def tiny_tokenizer() -> Any:
    """Byte-level BPE of 320 ids with distinct <pad>, <bos> and <eos>; it adds no BOS itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
