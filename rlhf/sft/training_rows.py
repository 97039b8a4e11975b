"""From canonical rows to the token ids and labels that the SFT stage trains and evaluates on."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rlhf.config import SFTStageConfig
from rlhf.data import Splits, encode_sft
from rlhf.sft.mixing import mix_texts
from rlhf.sft.splitting import split_conversations


def encode_splits(
    splits: Splits, tokenizer: PreTrainedTokenizerBase, config: SFTStageConfig
) -> tuple[Splits, list[dict[str, list[int]]], list[dict[str, list[int]]], list[str]]:
    """Split long conversations, make token ids and labels of all rows, and mix in text, as the
    configuration says.

    Returns:
        The splits with long conversations replaced by their pieces; the rows to train on; the
        held-out rows; and lines that say what was split, dropped and mixed in.
    """
    length, bad, lines = config.dataset.max_length, config.dataset.on_bad_row, []
    if config.dataset.split_long:
        splits, line = split_conversations(splits, tokenizer, length)
        lines.append(line)
    on_prompt = config.train_on_prompt
    train, too_long = encode_sft(splits.train, tokenizer, length, on_prompt, bad)
    heldout, too_long_heldout = encode_sft(splits.eval, tokenizer, length, on_prompt, bad)
    lines.append(splits.describe(too_long + too_long_heldout))
    num_rows, num_sequences = len(splits.train), len(train) + sum(too_long.values())
    if num_sequences > num_rows:
        lines.append(
            f"{num_rows} training rows become {num_sequences} sequences: the chat template renders "
            "earlier turns differently when more turns follow, so each answer is trained after the "
            "text that comes before it in generation"
        )
    splits.dropped += too_long + too_long_heldout
    if config.mix.fraction:
        train, line = mix_texts(train, config.mix, tokenizer, length, config.seed, bad)
        lines.append(line)
    return splits, train, heldout, lines
