"""A trained model without its adapters: LoRA merged into weights, quantised weights restored."""

from __future__ import annotations

import copy
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.models.forward import HEAD
from rlhf.models.quantization import dequantized_weight, is_quantized


def merged(model: Any) -> PreTrainedModel:
    """Return the plain model. If it has adapters, merge them into copies of the weights in main
    memory, after dequantising what bitsandbytes has quantised."""
    if not isinstance(model, PeftModel):
        return model
    base = cast(Any, model.get_base_model())
    config = copy.deepcopy(base.config)
    config.__dict__.pop("quantization_config", None)
    plain = type(base)(config)
    if any(key.startswith(f"{HEAD}.") and key.endswith(".bias") for key in base.state_dict()):
        plain.score = nn.Linear(plain.score.in_features, 1)  # the families' heads have no bias
    state = _merged_state(base, model.active_adapter, plain)
    plain.load_state_dict(state)
    plain.generation_config = getattr(base, "generation_config", None)
    for name, parameter in plain.named_parameters():
        # Each in its own dtype: `plain.to` would round a float32 head and the rotary frequencies.
        parameter.data = parameter.data.to(state[name].dtype)
    return plain


def _merged_state(base: Any, adapter: str, plain: nn.Module) -> dict[str, Tensor]:
    """Return the plain model's weights on the CPU, with the adapter's share added."""
    names = plain.state_dict().keys()  # leaves out adapters, and the scales of quantised weights
    state = {}
    for key, value in base.state_dict().items():
        name = key.replace(f".modules_to_save.{adapter}", "")
        name = name.replace(".token_adapter", "").replace(".base_layer", "")
        if name in names and ".original_module" not in key:
            state[name] = value.detach().cpu()
    for name, module in base.named_modules():
        if isinstance(module, TrainableTokensLayer):
            weight = module.get_merged_weights([adapter]).detach().cpu()
            state[f"{name.removesuffix('.token_adapter')}.weight"] = weight
        elif isinstance(module, LoraLayer) and not is_quantized(module.get_base_layer()):
            # PEFT wraps a layer of experts once for each weight: experts, experts.base_layer
            key = f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}"
            state[key] = (state[key] + _share(module, adapter)).to(state[key].dtype)
    return state | _dequantized_state(base, adapter, plain)


def _dequantized_state(base: Any, adapter: str, plain: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the quantised layers in floating point, with the adapter's share."""
    state = {}
    for name, module in base.named_modules():
        layer: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if not is_quantized(layer) or name.endswith(".base_layer"):
            continue
        weight = dequantized_weight(layer).cpu()
        if layer is not module:
            weight = weight + _share(module, adapter)
        if isinstance(plain.get_submodule(name), Conv1D):
            weight = weight.T.contiguous()  # GPT-2 stores its weights transposed
        state[f"{name}.weight"] = weight.to(base.dtype)
        if layer.bias is not None:  # bitsandbytes casts it to its compute dtype
            state[f"{name}.bias"] = layer.bias.detach().cpu().to(base.dtype)
    return state


def _share(layer: Any, adapter: str) -> Tensor:
    """Return what the adapter adds to the weight of a layer, on the CPU."""
    return layer.get_delta_weight(adapter).detach().cpu()
