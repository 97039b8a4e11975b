"""The token that ends an answer: the chat template's own becomes the EOS of an SFT run."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from rlhf.config import ModelConfig
from rlhf.console import say, warn
from rlhf.tokenizer import answer_frame, load_tokenizer, stop_strings


def load_sft_tokenizer(config: ModelConfig, prompts: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer; if its chat template ends every answer with one token, this token becomes
    EOS, so that servers stop there.

    Args:
        prompts: "text" or "conversation"; answers to text end with the model's own EOS.
    """
    tokenizer = load_tokenizer(config)
    frame, eos = answer_frame(tokenizer), tokenizer.eos_token
    if prompts == "text" or frame.end_token == eos or stop_strings(tokenizer):
        return tokenizer
    mark = frame.tail.strip()
    if frame.end_token is None:
        if mark:
            warn(
                f"the chat template ends every answer with {mark!r}, which is not a single token; "
                f"EOS ({eos}) follows after the last answer of a row. To make it the EOS, set "
                f"model.special_tokens=[{mark!r}] model.eos_token={mark!r}"
            )
        return tokenizer
    if config.eos_token is not None:
        warn(
            f"model.eos_token={eos!r}, but the chat template ends every answer with "
            f"{frame.end_token!r}, and the model learns to end with that; set model.eos_token=null"
        )
        return tokenizer
    say(
        f"sft: EOS is {frame.end_token} instead of {eos}, because the chat template ends every "
        "answer with it"
    )
    return load_tokenizer(replace(config, eos_token=frame.end_token))
