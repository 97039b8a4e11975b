"""LoRA adapters: put on a model, merged into its weights."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel

from rlhf.config import InputError, PeftConfig
from rlhf.models.forward import HEAD


def add_lora(model: PreTrainedModel, config: PeftConfig, task_type: str, seed: int) -> Any:
    """Wrap a model with LoRA adapters; the scalar head of a classifier is trained in full.

    Args:
        task_type: "CAUSAL_LM" or "SEQ_CLS".
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules) if config.target_modules else "all-linear",
        exclude_modules=[HEAD] if task_type == "SEQ_CLS" else None,
        modules_to_save=[HEAD] if task_type == "SEQ_CLS" else None,
        task_type=task_type,
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise InputError(f"peft.target_modules={config.target_modules}: {error}") from error


def merged(model: Any) -> PreTrainedModel:
    """Return the plain model; adapters, if there are any, are merged into copied weights."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    from peft.tuners.lora import LoraLayer

    adapter, base = model.active_adapter, cast(Any, model.get_base_model())
    state = {
        key.replace(".base_layer", "").replace(
            f".modules_to_save.{adapter}", ""
        ): value.detach().clone()
        for key, value in base.state_dict().items()
        if "lora_" not in key and ".original_module" not in key
    }
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            state[f"{name}.weight"] += cast(Any, module).get_delta_weight(adapter).detach()
    plain = type(base)(base.config)
    plain.load_state_dict(state)
    plain.generation_config = getattr(base, "generation_config", None)
    for name, parameter in plain.named_parameters():
        # Each in its own dtype: `plain.to` would round a float32 head and the rotary frequencies.
        parameter.data = parameter.data.to(state[name].dtype)
    return plain
