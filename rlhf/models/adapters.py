"""LoRA adapters on a model, and rows of the embedding tables that are trained next to them.
`what_to_save` chooses what a stage writes of both. `plain` takes them off again, `weights` merges
adapters from files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import TrainableTokensWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from rlhf.config import InputError, ModelConfig, PeftConfig, one_line
from rlhf.console import is_main_process
from rlhf.distributed import detached, is_sharded, whole
from rlhf.hub import ADAPTER_WEIGHTS
from rlhf.models.forward import HEAD
from rlhf.models.plain import merged
from rlhf.models.unread import stand_ins
from rlhf.tokenizer import stop_strings


def new_token_rows(
    tokenizer: PreTrainedTokenizerBase, model: ModelConfig, config: PeftConfig
) -> list[int]:
    """Return the ids of `model.special_tokens` whose rows are trained next to the adapters.

    With `peft.train_new_tokens=auto`, all of them are trained if one is the EOS, a stop string or a
    part of the chat template. New rows are equal until they are trained.
    """
    pads_only = {tokenizer.pad_token} - {tokenizer.eos_token}
    texts = [text for text in model.special_tokens if text not in pads_only]
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
    seed: int | None = None,
    token_rows: Sequence[int] = (),
) -> Any:
    """Wrap a model with LoRA adapters; the scalar head of a classifier is trained in full. Refuse
    names in `peft.target_modules` that fit no linear layer.

    Args:
        task_type: "CAUSAL_LM" or "SEQ_CLS".
        seed: of the adapters' weights; None where they do not matter.
        token_rows: rows of the input and output embedding tables that are trained too.
    """
    if seed is not None:
        torch.manual_seed(seed)
    layers = _linear_layers(model)
    names = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
    targets, is_classifier = config.target_modules, task_type == "SEQ_CLS"
    unknown = [t for t in targets or [] if not any(f".{x}".endswith(f".{t}") for x in layers)]
    if unknown:
        raise InputError(
            f"peft.target_modules={targets}: {type(model).__name__} has no linear layer named "
            f"{', '.join(unknown)}; it has {names} (null: all of them)"
        )
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(targets) if targets else "all-linear",
        exclude_modules=[HEAD] if is_classifier else None,
        modules_to_save=[HEAD] if is_classifier else None,
        trainable_token_indices=_tables(model, token_rows) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=task_type,
    )
    try:
        with stand_ins(model):
            adapted = get_peft_model(model, lora)
    except ValueError as error:  # no linear layers, or layers that PEFT cannot adapt
        raise InputError(
            f"peft.target_modules={targets or 'null'}: PEFT cannot put adapters on "
            f"{type(model).__name__} ({one_line(error)}); name some of its linear layers "
            f"({names or 'it has none'}), or train in full"
        ) from error
    _keep_attributes_of_tables(adapted)
    return adapted


def _keep_attributes_of_tables(adapted: nn.Module) -> None:
    for module in adapted.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.__class__ = _TableRows
            module.token_adapter.__class__ = _Rows


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the full names of the linear layers, without the heads."""
    heads = (model.get_output_embeddings(), getattr(model, HEAD, None))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and all(module is not head for head in heads)
    ]


def _tables(model: PreTrainedModel, rows: Sequence[int]) -> dict[str, list[int]]:
    """Map the name of each embedding table to its trained rows; PEFT adds a tied head itself."""
    tables = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        tables.append(model.get_output_embeddings())
    names = {module: name for name, module in model.named_modules()}
    return {names[table]: list(rows) for table in tables if table is not None and rows}


class _TableRows(TrainableTokensWrapper):
    """PEFT's wrapper of an embedding table, but every attribute of the table can be read: TRL reads
    the bias of the head."""

    def _hasattr_wrapped(self, name: str, modules: Any) -> bool:
        return True

    def _getattr_wrapped(self, name: str, modules: Any) -> Any:
        table = modules["token_adapter"].get_base_layer()
        if name == "weight" and not is_sharded(table):
            return super()._getattr_wrapped(name, modules)
        return getattr(table, name)  # outside of a pass, a weight in slices has no rows to replace


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


# --- What a stage writes ------------------------------------------------------------------------


def what_to_save(
    model: Any,
    config: PeftConfig,
    base: str | None,
    revision: str | None = None,
    folder: Path | None = None,
) -> tuple[PreTrainedModel, Callable[[Path], None] | None]:
    """Return the model for `final/`, and a function that writes its adapter into a directory.

    There is no such function without adapters, with `peft.save=merged`, and for a base that is in
    no file. With `peft.save=adapter`, the model is not merged, because it is not written.

    All processes that share a sharded model call this together; only the main one gets a model.

    Args:
        base: directory or Hub id of the model below the adapters; None if it was built.
        folder: where the weights of a sharded model wait in files until they are written.
    """
    if not (is_main_process() or is_sharded(model)):
        return model, None
    if not isinstance(model, PeftModel) or base is None or config.save == "merged":
        return merged(model, folder), None
    write = adapter_writer(model, base, revision)
    plain = model.get_base_model() if config.save == "adapter" else merged(model, folder)
    return cast(Any, plain), write


def adapter_writer(
    model: PeftModel, base: str, revision: str | None = None
) -> Callable[[Path], None]:
    """Return a function that writes the adapter as it is now into a directory, with the name of its
    base. All processes that share a sharded model call this together."""
    weights = model.state_dict(keep_vars=True)
    tensors = get_peft_model_state_dict(model, weights, save_embedding_layers=False)
    copies = {k: whole(detached(v)).cpu().contiguous().clone() for k, v in tensors.items()}
    settings = copy.copy(model.active_peft_config)
    return partial(_save_adapter, settings, copies, base, revision)


def _save_adapter(
    settings: Any, tensors: dict[str, Tensor], base: str, revision: str | None, directory: Path
) -> None:
    """Write adapter_model.safetensors and adapter_config.json, as PEFT reads them."""
    local = Path(base).exists()  # PEFT would look for a relative path below the current folder
    settings.base_model_name_or_path = str(Path(base).resolve()) if local else base
    settings.revision, settings.inference_mode = revision, True
    settings.save_pretrained(str(directory))
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
