"""LoRA adapters on a model, and rows of the embedding tables that are trained next to them.

`merge` makes a plain model again. Adapters that somebody else trained are in `adapter_files`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from rlhf.config import InputError, ModelConfig, PeftConfig
from rlhf.hub import one_line
from rlhf.models.forward import HEAD
from rlhf.tokenizer import stop_strings


def new_token_rows(
    tokenizer: PreTrainedTokenizerBase, model: ModelConfig, config: PeftConfig
) -> list[int]:
    """Return the ids of `model.special_tokens` whose rows are trained next to the adapters.

    With `peft.train_new_tokens=auto`, all of them are trained if one is the EOS, a stop string or a
    part of the chat template; otherwise none. All new rows are equal at first, so a model that does
    not train them cannot tell one new token from another.
    """
    texts = [text for text in model.special_tokens if text != tokenizer.pad_token]
    if config.train_new_tokens == "auto":
        ends, template = {tokenizer.eos_token, *stop_strings(tokenizer)}, tokenizer.chat_template
        if not any(text in ends or text in str(template) for text in texts):
            return []
    elif not config.train_new_tokens:
        return []
    return [cast(int, tokenizer.convert_tokens_to_ids(text)) for text in texts]


def add_lora(
    model: PreTrainedModel,
    config: PeftConfig,
    task_type: str,
    seed: int,
    token_rows: Sequence[int] = (),
) -> Any:
    """Wrap a model with LoRA adapters; the scalar head of a classifier is trained in full.

    Args:
        task_type: "CAUSAL_LM" or "SEQ_CLS".
        token_rows: rows of the input and output embedding tables that are trained too.

    Raises:
        InputError: a name in `peft.target_modules` fits no linear layer of the model.
    """
    torch.manual_seed(seed)
    adapted = with_lora(model, config, task_type, token_rows)
    for module in adapted.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.__class__ = _TableRows
            module.token_adapter.__class__ = _Rows
    return adapted


def with_lora(
    model: PreTrainedModel, config: PeftConfig, task_type: str, token_rows: Sequence[int] = ()
) -> Any:
    """As `add_lora`, but without a seed and with PEFT's own layers for token rows."""
    _check_targets(model, config.target_modules)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules) if config.target_modules else "all-linear",
        exclude_modules=[HEAD] if task_type == "SEQ_CLS" else None,
        modules_to_save=[HEAD] if task_type == "SEQ_CLS" else None,
        trainable_token_indices=_tables(model, token_rows) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=task_type,
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:  # no linear layers, or layers that PEFT cannot adapt
        raise InputError(
            f"peft.target_modules={config.target_modules or 'null'}: PEFT cannot put adapters on "
            f"{type(model).__name__} ({one_line(error)}); name some of its linear layers "
            f"({', '.join(_linear_names(model)) or 'it has none'}), or train in full"
        ) from error


def _tables(model: PreTrainedModel, rows: Sequence[int]) -> dict[str, list[int]]:
    """Map the name of each embedding table to its trained rows; PEFT adds a tied head itself."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    if tables[1] is not None and model.config.tie_word_embeddings:
        tables.pop()
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(table)]: list(rows) for table in tables if table is not None and rows}


class _TableRows(TrainableTokensWrapper):
    """PEFT's wrapper of an embedding table, but every attribute of the table can be read: TRL reads
    the bias of the head."""

    def _hasattr_wrapped(self, name: str, modules: Any) -> bool:
        return True

    def _getattr_wrapped(self, name: str, modules: Any) -> Any:
        if name == "weight":
            return super()._getattr_wrapped(name, modules)
        return getattr(modules["token_adapter"].get_base_layer(), name)


class _Rows(TrainableTokensLayer):
    """PEFT's layer, but a head keeps its bias (GPT-J and Phi have one)."""

    def forward_adapters(
        self, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        table: Any = self.get_base_layer()
        off = self.disable_adapters or self.merged or not active_adapters
        if off or not isinstance(table, nn.Linear):
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        return F.linear(x, self.get_merged_weights(active_adapters), table.bias)


def _check_targets(model: PreTrainedModel, targets: list[str] | None) -> None:
    linear = _linear_layers(model)
    unknown = [t for t in targets or [] if not any(f".{name}".endswith(f".{t}") for name in linear)]
    if unknown:
        raise InputError(
            f"peft.target_modules={targets}: {type(model).__name__} has no linear layer named "
            f"{', '.join(unknown)}; it has {', '.join(_linear_names(model))} (null: all of them)"
        )


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the full names of the linear layers, without the heads."""
    heads = (model.get_output_embeddings(), getattr(model, HEAD, None))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and all(module is not head for head in heads)
    ]


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Return the last part of each linear layer's name, once: what `peft.target_modules` takes."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in _linear_layers(model)))
