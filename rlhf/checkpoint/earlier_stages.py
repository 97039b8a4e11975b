"""Do two stages fit together? Comparison of a stage with the record of an earlier one.

What a person may have intended is a warning; what cannot work is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.checkpoint.record import StageRecord, read_record
from rlhf.checkpoint.weight_hashes import hash_weights
from rlhf.config import InputError
from rlhf.console import warn
from rlhf.tokenizer import hash_template, hash_tokenizer


def warn_about_sft_model(reward_model: str, policy: str) -> None:
    """Warn if a reward model was not trained from the policy's own SFT model.

    Args:
        reward_model: directory or Hub id.
        policy: directory or Hub id that PPO starts from.
    """
    record = read_record(reward_model)
    if record is None or record.parent is None:
        return
    ours, weights = _sft_model(policy)
    if weights is not None and record.parent_weights is not None:
        is_same = weights == record.parent_weights
    else:
        is_same = ours == record.parent
    if not is_same:
        theirs = _with_hash(record.parent, record.parent_weights)
        warn(
            f"the reward model {reward_model} was trained from {theirs}, but the SFT model of the "
            f"policy is {_with_hash(ours, weights)}: it may misjudge what this policy says; train "
            "both from the same SFT directory"
        )


def _sft_model(policy: str) -> tuple[str, str | None]:
    """Follow a policy through its PPO runs to the model that the first one started from.

    Returns:
        Name of that model, and hash of its weights (None for a Hub id).
    """
    path = policy
    weights = hash_weights(Path(path)) if Path(path).is_dir() else None
    seen: set[str] = set()
    while (record := read_record(path)) is not None and path not in seen:
        if record.stage != "ppo" or record.parent is None:
            break
        seen.add(path)
        path, weights = record.parent, record.parent_weights
    return path, weights


def _with_hash(path: str, weights: str | None) -> str:
    return path if weights is None else f"{path} (weights {weights[:12]})"


def warn_about_prompts(record: StageRecord | None, prompts: str) -> None:
    """Warn if the previous stage trained on prompts of a different form."""
    if record is not None and record.prompts not in (None, "mixed", prompts):
        fix = "set dataset.as_conversation=true" if prompts == "text" else "use a text format"
        warn(
            f"the {record.stage} stage trained on {record.prompts} prompts, but these are "
            f"{prompts} prompts, which the model has never seen; {fix}"
        )


def warn_about_template(record: StageRecord | None, tokenizer: Any, path: str | None) -> None:
    """Warn if SFT gives a model a chat template that it was not trained with."""
    if record is not None and record.template != hash_template(tokenizer):
        warn(
            f"model.path={path} was trained with a different chat template; leave "
            "model.chat_template and model.stop_strings unset (null) to keep the checkpoint's"
        )


def require_same_tokenizer(
    tokenizer: Any, record: StageRecord | None, ours: str, theirs: str
) -> None:
    """Require that two stages share vocabulary, special tokens and chat template.

    Args:
        ours: description of where `tokenizer` comes from, for the message.
        theirs: description of where `record` comes from.

    Raises:
        InputError: names both sides and what differs.
    """
    if record is None:
        return
    if record.tokenizer != hash_tokenizer(tokenizer):
        raise InputError(
            f"tokenizer mismatch: {theirs} (hash {record.tokenizer[:12]}, eos "
            f"{record.eos_token_id}, pad {record.pad_token_id}) and {ours} (hash "
            f"{hash_tokenizer(tokenizer)[:12]}, eos {tokenizer.eos_token_id}, pad "
            f"{tokenizer.pad_token_id}) have different vocabularies; train both from the same SFT "
            "directory"
        )
    if record.template != hash_template(tokenizer):
        raise InputError(
            f"chat template mismatch: {theirs} and {ours} render prompts differently; train both "
            "from the same SFT directory, or leave model.chat_template unset (null)"
        )
