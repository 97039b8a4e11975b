"""Adapters in a directory, of any kind that PEFT can merge: merged when the model is loaded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.config import InputError
from rlhf.hub import ADAPTER_WEIGHTS, Misfits, one_line
from rlhf.models.embeddings import resize_embeddings

PREFIX = "base_model.model."  # starts every name in adapter_model.safetensors


def merge_stored_adapter(model: PreTrainedModel, directory: Path, label: str) -> PreTrainedModel:
    """Merge the adapter in a directory into a model, in place; a layer that the adapter holds
    whole, such as a head, replaces the model's own.

    Args:
        label: name of the adapter in messages.

    Raises:
        InputError: the adapter belongs to another model, or is of a kind that cannot be merged.
    """
    tensors = _without_doubles(load_file(directory / ADAPTER_WEIGHTS))
    try:
        settings = PeftConfig.from_pretrained(str(directory))
        settings.task_type = None  # a wrapper without a forward pass of its own
        settings.inference_mode = True
        _fit_tables(model, tensors, settings)
        wrapper = PeftModel(model, settings)
    except (ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise InputError(
            f"{label}: the adapter in {directory} does not fit {type(model).__name__} "
            f"({one_line(error)}); set base_model_name_or_path there to the model it was trained on"
        ) from error
    if not hasattr(wrapper.base_model, "merge_and_unload"):
        raise InputError(
            f"{label}: an adapter of type {settings.peft_type} cannot be merged into its base; "
            "train a LoRA adapter, or give a whole model"
        )
    load_adapter(wrapper, tensors, f"{label}: the adapter in {directory}")
    try:
        return wrapper.merge_and_unload()
    except (NotImplementedError, RuntimeError, ValueError) as error:  # forms that PEFT cannot merge
        raise InputError(
            f"{label}: the adapter in {directory} cannot be merged into its base "
            f"({one_line(error)}); train one without this option, or give a whole model"
        ) from error


def load_adapter(wrapper: Any, tensors: dict[str, Tensor], label: str) -> None:
    """Give the adapter of a PEFT model its weights, as in adapter_model.safetensors, in place.

    Raises:
        InputError: names or shapes differ from those of this adapter on this model.
    """
    try:
        result: Any = set_peft_model_state_dict(wrapper, tensors)
    except KeyError as error:  # a module that is stored whole is missing
        raise InputError(f"{label} does not fit the model: {Misfits(list(error.args))}") from error
    except (RuntimeError, ValueError, LookupError) as error:  # other shapes
        raise InputError(f"{label} does not fit the model ({one_line(error)})") from error
    # PEFT derives or shares the others: rows of tied tables, the projections of VeRA
    stored = get_peft_model_state_dict(wrapper, save_embedding_layers=False)
    adapter = f".{wrapper.active_adapter}"
    missing = [
        name
        for name in result.missing_keys
        if adapter in name
        and name.replace(".modules_to_save", "").replace(adapter, "", 1) in stored
    ]
    misfits = Misfits(missing, list(result.unexpected_keys))
    if misfits:
        raise InputError(f"{label} does not fit the model: {misfits}")


def _without_doubles(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the second copy that PEFT writes of a table that is resized and trained."""
    kept = {}
    for name, tensor in tensors.items():
        plain = name.replace(".modules_to_save", "").replace(".original_module", "")
        if plain == name or plain not in tensors:
            kept[name] = tensor
    return kept


def _fit_tables(model: PreTrainedModel, tensors: dict[str, Tensor], settings: Any) -> None:
    """Give the embedding tables as many rows as in the adapter's training, in place; untie two tied
    tables if the adapter changes only one of them."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {module: name for name, module in model.named_modules()}
    trained = getattr(settings, "trainable_token_indices", None) or []
    lists = trained.values() if isinstance(trained, dict) else [trained]
    num_rows = max((index + 1 for rows in lists for index in rows), default=0)
    is_changed = False
    for table, (name, tensor) in itertools.product(tables, tensors.items()):
        part = name.removeprefix(f"{PREFIX}{names.get(table)}.")
        if part != name:
            is_changed |= "trainable_tokens" not in part  # PEFT trains these rows in both tables
            if part in ("weight", "base_layer.weight", "lora_B.weight"):
                num_rows = max(num_rows, tensor.shape[0])
            elif part == "lora_embedding_A":
                num_rows = max(num_rows, tensor.shape[1])
    if num_rows > cast(Any, tables[0]).weight.shape[0]:
        resize_embeddings(model, num_rows)
    elif is_changed and num_rows:
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    if is_changed and not getattr(settings, "ensure_weight_tying", False):
        _untie(model)


def _untie(model: Any) -> None:
    """Give an output table that shares the input table's weights its own copy, in place."""
    source, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is source.weight:
        head.weight = nn.Parameter(source.weight.detach().clone())
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
