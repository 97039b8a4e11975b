"""LoRA adapters: put on a model, merged into its weights."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.config import InputError, PeftConfig
from rlhf.models.forward import HEAD
from rlhf.models.quantization import dequantized_weight, is_quantized


def add_lora(model: PreTrainedModel, config: PeftConfig, task_type: str, seed: int) -> Any:
    """Wrap a model with LoRA adapters; the scalar head of a classifier is trained in full.

    Args:
        task_type: "CAUSAL_LM" or "SEQ_CLS".

    Raises:
        InputError: a name in `peft.target_modules` fits no linear layer of the model.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(model, config.target_modules)
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules) if config.target_modules else "all-linear",
        exclude_modules=[HEAD] if task_type == "SEQ_CLS" else None,
        modules_to_save=[HEAD] if task_type == "SEQ_CLS" else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=task_type,
    )
    return get_peft_model(model, lora)


def _check_targets(model: PreTrainedModel, targets: list[str] | None) -> None:
    heads = (model.get_output_embeddings(), getattr(model, HEAD, None))
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and all(module is not head for head in heads)
    ]
    unknown = [t for t in targets or [] if not any(f".{name}".endswith(f".{t}") for name in linear)]
    if unknown:
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
        raise InputError(
            f"peft.target_modules={targets}: {type(model).__name__} has no linear layer named "
            f"{', '.join(unknown)}; it has {known} (null: all of them)"
        )


def merged(model: Any) -> PreTrainedModel:
    """Return the plain model; adapters, if there are any, are merged into copies of the weights in
    main memory, and what bitsandbytes has quantised is dequantised first."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    base = cast(Any, model.get_base_model())
    config = copy.deepcopy(base.config)
    config.__dict__.pop("quantization_config", None)
    plain = type(base)(config)
    state = _merged_state(base, model.active_adapter, plain)
    plain.load_state_dict(state)
    plain.generation_config = getattr(base, "generation_config", None)
    for name, parameter in plain.named_parameters():
        # Each in its own dtype: `plain.to` would round a float32 head and the rotary frequencies.
        parameter.data = parameter.data.to(state[name].dtype)
    return plain


def _merged_state(base: nn.Module, adapter: str, plain: nn.Module) -> dict[str, Tensor]:
    """Weights of the plain model: copies in main memory, with the adapter's share added."""
    from peft.tuners.lora import LoraLayer

    names = plain.state_dict().keys()  # leaves out adapters, and the scales of quantised weights
    state = {}
    for key, value in base.state_dict().items():
        name = key.replace(".base_layer", "").replace(f".modules_to_save.{adapter}", "")
        if name in names and ".original_module" not in key:
            state[name] = value.detach().to("cpu", copy=True)
    for name, module in base.named_modules():
        key = f"{name}.weight"
        if key not in names:
            continue
        layer: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
        weight, dtype = state[key], state[key].dtype
        if is_quantized(layer):
            weight, dtype = dequantized_weight(layer).cpu(), cast(Any, base).dtype
            if layer.bias is not None:  # bitsandbytes casts it to what it computes in
                state[f"{name}.bias"] = state[f"{name}.bias"].to(dtype)
        if isinstance(module, LoraLayer):
            weight = weight + cast(Any, module).get_delta_weight(adapter).detach().cpu()
        if is_quantized(layer) and isinstance(plain.get_submodule(name), Conv1D):
            weight = weight.T.contiguous()  # GPT-2 stores its weights the other way round
        state[key] = weight.to(dtype)
    return state
