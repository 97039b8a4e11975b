"""Loading a tokenizer: its special tokens, a pad token and a chat template for all three stages.

Any id can pad, because masks come from lengths; so no model gets a row for the sake of a pad token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
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

BYTE_FF = ("ÿ", "<0xFF>")  # as byte-level BPE and SentencePiece write it; no text has this byte


def load_tokenizer(config: ModelConfig, field: str = "model.path") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with its special tokens, a pad token and a chat template.

    Without a pad token, EOS pads.

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
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
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


def pad_with_no_stop_id(tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> None:
    """Give the tokenizer of a reward model a pad token of its vocabulary that ends no sequence, in
    place: the classifiers of transformers read the score at the last token that is not pad.

    Args:
        stop_ids: ids that end an answer.
    """
    if tokenizer.pad_token_id in stop_ids:
        pad = next(i for i in _pad_candidates(tokenizer) if i not in stop_ids)
        token: Any = tokenizer.convert_ids_to_tokens(pad)
        if pad not in tokenizer.added_tokens_decoder:
            from transformers import AddedToken

            # in a text it is this token only where it is a word of its own; see `hash_rendering`
            token = AddedToken(token, single_word=True, special=True, normalized=False)
        tokenizer.add_special_tokens({"pad_token": token})


def _pad_candidates(tokenizer: Any) -> Iterator[int]:
    """Yield ids, the best pads first: unknown token, unused special tokens, a byte that no text
    has, then all ids from the last one on."""
    if tokenizer.unk_token_id is not None:
        yield tokenizer.unk_token_id
    template = str(tokenizer.chat_template)
    for i, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.special and i != tokenizer.bos_token_id and token.content not in template:
            yield i
    vocabulary = tokenizer.get_vocab()
    for token in BYTE_FF:
        if token in vocabulary and tokenizer.decode([vocabulary[token]]) == "\ufffd":
            yield vocabulary[token]
    yield from sorted(vocabulary.values(), reverse=True)


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
