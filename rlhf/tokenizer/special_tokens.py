"""Loading a tokenizer: its special tokens, a pad token and a chat template for all three stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf.config import InputError, ModelConfig, load_object
from rlhf.tokenizer.chat_templates import (
    chat_template_text,
    declare_stop_strings,
    stop_strings,
    template_of,
)
from rlhf.tokenizer.ids import token_ids

if TYPE_CHECKING:  # commands import this room before they need transformers
    from transformers import PreTrainedTokenizerBase

PAD_TOKEN = "<|pad|>"


def load_tokenizer(config: ModelConfig, field: str = "model.path") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with its special tokens, a pad token and a chat template.

    A missing pad token, or one equal to EOS, is replaced by a new `<|pad|>`: PPO never samples the
    pad token, and libraries that look for "the last token that is not pad" would miss the EOS.

    Args:
        config: the source is `tokenizer`, else `path`: a Hub id, a directory or
            `python:module.function`. Without `chat_template` the tokenizer keeps its own (of
            several named ones the one called `default`) or gets `plain`. `stop_strings` are
            written into the template.
        field: configuration key of `path`, for messages.
    """
    source = str(config.tokenizer or config.path)
    tokenizer = read_tokenizer(config, field)
    _set_special_tokens(tokenizer, config, source)
    prefix = "model." if field.startswith("model.") else ""  # the chat has these knobs at the top
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {source} has no EOS token; set it in its tokenizer_config.json"
            + (", or give model.eos_token" if prefix else "")
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    template = _chat_template(tokenizer, config, source, f"{prefix}chat_template")
    if config.stop_strings is not None:
        template = declare_stop_strings(template, config.stop_strings)
    tokenizer.chat_template = template
    stop_strings(tokenizer)  # refuses a declaration that cannot be read
    return tokenizer


def read_tokenizer(config: ModelConfig, field: str = "model.path") -> Any:
    """Load a tokenizer unchanged, as it is stored."""
    from transformers import AutoTokenizer

    from rlhf.hub import call_loader, tokenizer_directory

    source = config.tokenizer or config.path
    assert source is not None
    if source.startswith("python:"):
        return load_object(source, "model.tokenizer")()
    field = field.replace(".path", ".tokenizer") if config.tokenizer else field
    code = config.trust_remote_code
    directory = tokenizer_directory(source, field, config.revision, code)
    load = AutoTokenizer.from_pretrained
    return call_loader(load, directory, f"{field}={source}", trust_remote_code=code)


def _set_special_tokens(tokenizer: Any, config: ModelConfig, source: str) -> None:
    """Add `special_tokens`, then replace EOS and pad where the configuration names them."""
    if config.special_tokens:
        tokens = {"extra_special_tokens": config.special_tokens}
        tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)
    for token in config.special_tokens:
        _require_one_id(tokenizer, "special_tokens", token, source)
    for name in ("eos_token", "pad_token"):
        token = getattr(config, name)
        if token is not None:
            _require_one_id(tokenizer, name, token, source)
            tokenizer.add_special_tokens({name: token})
    if config.pad_token is not None and config.pad_token == tokenizer.eos_token:
        raise InputError(
            f"model.pad_token={config.pad_token!r} is also the EOS token of {source}, but PPO "
            "never samples the pad token: no response could end; give another one, or null for a "
            f"new {PAD_TOKEN}"
        )


def _require_one_id(tokenizer: Any, name: str, token: str, source: str) -> None:
    """Refuse a token that is not encoded as its own id, alone and inside a text."""
    alone, inside = token_ids(token, tokenizer), token_ids(f"\n\n{token}x", tokenizer)
    own = tokenizer.convert_tokens_to_ids(token)
    if alone == [own] and own in inside and tokenizer.convert_ids_to_tokens(own) == token:
        return
    if name == "special_tokens":
        fix = "choose tokens so that none is part of another"
    else:
        fix = f"add it to model.special_tokens: model.special_tokens=[{token!r}]"
    what = f"{len(alone)} ids, {alone}" if len(alone) != 1 else f"other ids inside a text, {inside}"
    raise InputError(
        f"model.{name}={token!r} must be one id at every place in a text, but the tokenizer of "
        f"{source} splits it into {what}; {fix}"
    )


def _chat_template(tokenizer: Any, config: ModelConfig, source: str, field: str) -> str:
    """Return the configured chat template, else the tokenizer's own, else `plain`."""
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if config.chat_template is not None:
        return chat_template_text(config.chat_template, field, named)
    own = template_of(tokenizer)
    if own is None and named:
        raise InputError(
            f"the tokenizer of {source} has the chat templates {', '.join(sorted(named))}, and "
            f"none named default; choose one, e.g. {field}={min(named)}"
        )
    return chat_template_text("plain") if own is None else own
