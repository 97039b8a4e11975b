"""Weights of a stored model: first the whole model, then the adapters on it, of any kind that PEFT
can merge.

Missing, surplus and misshapen weights are errors; a fresh head is never substituted.
"""

from __future__ import annotations

import copy
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)

from rlhf.config import InputError, ModelConfig, one_line
from rlhf.console import say
from rlhf.gguf_files import is_gguf
from rlhf.hub import (
    ADAPTER_WEIGHTS,
    Misfits,
    Source,
    call_loader,
    read_json,
    tensor_names,
    weight_files,
)
from rlhf.models.embeddings import pad_arguments, resize_embeddings
from rlhf.models.forward import HEAD, has_linear_head, linear_head
from rlhf.models.from_gguf import gguf_arguments, unread_gguf
from rlhf.models.plain import STORED_DTYPE
from rlhf.models.quantization import quantization_arguments
from rlhf.models.unread import leave_unread, pass_on, stand_ins, unread

GENERATION_CONFIG = "generation_config.json"
PREFIX = "base_model.model."  # starts every name in adapter_model.safetensors
# Masks, positions and frequencies: older libraries saved them, models compute them.
BUFFER = re.compile(r"\.(inv_freq|masked_bias|position_ids)$|\.(attn|attention)\.bias$")


def load_language_model(source: Source, config: ModelConfig) -> PreTrainedModel:
    """Load a causal language model with its adapters merged; refuse a classifier."""
    if source.is_classifier:
        raise InputError(
            f"{source.label} is a sequence classifier, such as a reward model, but must be a "
            "language model"
        )
    model, misfits = _read(AutoModelForCausalLM, source, config)
    return _with_adapters(model, source, misfits)


def load_backbone(source: Source, config: ModelConfig) -> PreTrainedModel:
    """Load a causal language model as a classifier with one label; its head has no weights yet.

    Raises:
        InputError: it is a classifier already, or the family has no classifier with a linear head.
    """
    settings = read_json(source.directory / "config.json")
    family = settings.get("model_type")
    is_known = family in CLASSIFIERS or settings.get("auto_map") or is_gguf(source.directory)
    if not is_known:
        raise InputError(
            f"{source.label}: transformers has no sequence classifier for model_type={family}, but "
            "reward models and critics are built on one; take a model of another family, or in PPO "
            "your own scorer (scorer=python) and an estimator without a critic, e.g. "
            "ppo.advantage=rloo ppo.samples_per_prompt=4"
        )
    if source.adapters:
        policy = load_language_model(source, config)
        model = new_classifier(policy, source.label, config.trust_remote_code)
        setattr(model, model.base_model_prefix, policy.base_model)
        setattr(model, STORED_DTYPE, getattr(policy, STORED_DTYPE))
        pass_on(policy, model)
        return model
    model, misfits = _read(AutoModelForSequenceClassification, source, config, num_labels=1)
    _require_linear_head(model, source.label)
    if source.is_classifier or f"{HEAD}.weight" not in misfits.missing:
        raise InputError(
            f"{source.label} is a sequence classifier with its own head, but must be a language "
            "model, which gets a fresh head"
        )
    misfits.missing.remove(f"{HEAD}.weight")
    misfits.unexpected = _of_backbone(misfits.unexpected, model)
    _require_fit(model, source, misfits)
    return model


def load_classifier(source: Source, config: ModelConfig) -> PreTrainedModel:
    """Load a sequence classifier with one label and merge its adapters; a linear head named `score`
    is float32 and may have a bias."""
    model, misfits = _read(AutoModelForSequenceClassification, source, config, num_labels=1)
    if source.adapters:  # on a language model: its head is not part of a classifier
        misfits.unexpected = _of_backbone(misfits.unexpected, model)
    if has_linear_head(model):
        bias = f"{HEAD}.bias"
        misfits.unexpected = [name for name in misfits.unexpected if name != bias]
        _set_head(model, source, has_bias=bias in _stored_whole(source))
    return _with_adapters(model, source, misfits)


# --- The whole model ----------------------------------------------------------------------------


def _read(factory: Any, source: Source, config: ModelConfig, **kwargs: Any) -> tuple[Any, Misfits]:
    """Load the whole model, without adapters, and say which weights do not fit. With
    `source.in_slices`, it comes without weights, if `shard` can read them."""
    if source.in_slices and is_gguf(source.directory):
        model, reason = unread_gguf(factory, source, config, **kwargs)
        if reason is None:
            heads = [n for n, _ in model.named_parameters() if n.rpartition(".")[0] == HEAD]
            return model, Misfits(heads, [], [])
        say(f"{source.label}: each process reads the whole model, because {reason}")
        source = replace(source, in_slices=False)
    places = pad_arguments(source.directory) | ({"device_map": "meta"} if source.in_slices else {})
    loaded: Any = call_loader(
        factory.from_pretrained,
        source.directory,
        source.label,
        dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the loading info has them
        **(kwargs | quantization_arguments(config) | gguf_arguments(source) | places),
    )
    model, info = loaded
    if source.in_slices:
        model.__dict__.pop("hf_device_map", None)
        named = read_json(source.directory / "config.json")
        if reason := leave_unread(model, weight_files(source.directory, named)):
            say(f"{source.label}: each process reads the whole model, because {reason}")
            return _read(factory, replace(source, in_slices=False), config, **kwargs)
    model.name_or_path = source.path  # PEFT writes it into its checkpoints: not the Hub's cache
    setattr(model, STORED_DTYPE, _stored_dtype(source.directory))
    return model, Misfits(
        sorted(info["missing_keys"]),
        sorted(name for name in info["unexpected_keys"] if not BUFFER.search(name)),
        sorted(info["mismatched_keys"]),
    )


def _stored_dtype(directory: Path) -> torch.dtype:
    """Return the type of the weights in a model's files, by its config or else by the files."""
    settings = read_json(directory / "config.json")
    named = getattr(torch, str(settings.get("dtype") or settings.get("torch_dtype")), None)
    if named is not None:
        return named
    for file in weight_files(directory, settings)[:1]:
        with safe_open(file, framework="pt") as tensors:
            first = tensors.get_tensor(next(iter(tensors.keys())))
            return first.dtype if first.is_floating_point() else torch.float32
    return torch.float32


def _require_fit(model: Any, source: Source, misfits: Misfits) -> None:
    if not misfits:
        return
    names = [*misfits.missing, *(name for name, *_ in misfits.shapes)]
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    if is_classifier and any(not n.startswith(f"{model.base_model_prefix}.") for n in names):
        raise InputError(
            f"{source.label}: {misfits}: it is not a reward model with one label; give the final/ "
            "directory of a reward stage, or write a Python scorer that calls the model: "
            "scorer=python scorer.path=my_scorer.score (example: "
            "conf/scorer/python.yaml)"
        )
    raise InputError(
        f"{source.label} does not fit {type(model).__name__}: {misfits}; take another copy, or "
        "write a complete one with from_pretrained and save_pretrained"
    )


def _of_backbone(names: list[str], model: Any) -> list[str]:
    """Return the names of the backbone's weights, without those of another task's head."""
    return [name for name in names if name.startswith(f"{model.base_model_prefix}.")]


# --- Adapters on it -----------------------------------------------------------------------------


def _with_adapters(model: Any, source: Source, misfits: Misfits) -> PreTrainedModel:
    """Merge the adapters of a source; the model's files may lack a weight that an adapter holds
    whole, such as a head."""
    whole = _stored_whole(source)
    misfits.missing = [name for name in misfits.missing if name not in whole]
    _require_fit(model, source, misfits)
    for directory in source.adapters:
        model = merge_stored_adapter(model, directory, source.label)
    if source.adapters:
        model.requires_grad_(True)  # PEFT has frozen it
        model.name_or_path = source.path
        if model.can_generate() and (source.adapters[-1] / GENERATION_CONFIG).is_file():
            model.generation_config = GenerationConfig.from_pretrained(source.adapters[-1])
    return model


def _stored_whole(source: Source) -> set[str]:
    """Return the names of whole weights that the adapters of a source hold, such as a head."""
    files = [directory / ADAPTER_WEIGHTS for directory in source.adapters]
    return {name.removeprefix(PREFIX) for file in files for name in tensor_names(file)}


def merge_stored_adapter(model: PreTrainedModel, directory: Path, label: str) -> PreTrainedModel:
    """Merge the adapter in a directory into a model, in place, or into one without weights when it
    is read; a layer that the adapter holds whole, such as a head, replaces the model's own.

    Args:
        label: name of the adapter in messages.

    Raises:
        InputError: the adapter belongs to another model, or is of a kind that cannot be merged.
    """
    with stand_ins(model):
        wrapper = put_stored_adapter(model, directory, label)
    if (waits := unread(model)) is not None:
        return waits.merge(wrapper)
    try:
        return wrapper.merge_and_unload()
    except (NotImplementedError, RuntimeError, ValueError) as error:  # forms that PEFT cannot merge
        raise InputError(
            f"{label}: the adapter in {directory} cannot be merged into its base "
            f"({one_line(error)}); train one without this option, or give a whole model"
        ) from error


def put_stored_adapter(
    model: PreTrainedModel,
    directory: Path,
    label: str,
    task_type: str | None = None,
    trains: bool = False,
) -> Any:
    """Put the adapter in a directory on a model, in place.

    Args:
        task_type: written into the adapter's settings where it is saved again.
        trains: whether the adapter gets gradients; the model never does.
    """
    tensors = _without_doubles(load_file(directory / ADAPTER_WEIGHTS))
    try:
        settings = PeftConfig.from_pretrained(str(directory))
        settings.task_type = None  # a wrapper without a forward pass of its own
        settings.inference_mode = not trains
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
    settings.task_type = task_type
    return wrapper


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


# --- The head -----------------------------------------------------------------------------------


def _require_linear_head(model: Any, label: str) -> None:
    if not has_linear_head(model):
        raise InputError(
            f"{label}: {type(model).__name__} has no linear head named {HEAD!r} to read at "
            "each token; give a causal language model"
        )


def new_classifier(policy: Any, label: str, trust_remote_code: bool) -> Any:
    """Make a classifier with one label for a language model's backbone; it has no weights yet.

    Args:
        label: of the language model, for messages.
    """
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    config.__dict__.pop("quantization_config", None)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        raise InputError(f"{label} has no classifier ({one_line(error)})") from error
    _require_linear_head(model, label)
    assert type(model.base_model) is type(policy.base_model)
    return model


def _set_head(model: Any, source: Source, has_bias: bool) -> None:
    """Give a classifier the head in its files again, in place: in float32, because a load in half
    precision has rounded it, and with a bias, because the families' classes have none."""
    head, stored = getattr(model, HEAD), {}
    for file in weight_files(source.directory, read_json(source.directory / "config.json")):
        with safe_open(file, framework="pt") as tensors:
            for part in ("weight", "bias"):
                if f"{HEAD}.{part}" in tensors.keys():
                    stored[part] = tensors.get_tensor(f"{HEAD}.{part}")
    weight = stored.get("weight", head.weight.detach())
    if weight.shape != head.weight.shape or weight.is_meta:  # `_require_fit` refuses it
        return
    bias = stored.get("bias", torch.zeros(1) if has_bias else None)
    setattr(model, HEAD, linear_head(weight, bias, head.weight.device))
