"""Linear layers in 8 or 4 bits, by bitsandbytes; embeddings and heads keep their precision.

8bit is LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339); 4bit is nf4 with double quantisation
(Dettmers et al. 2023, arXiv 2305.14314). Left out: models whose files are already quantised.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from rlhf.config import InputError, ModelConfig, PeftConfig, one_line


def quantization_arguments(config: ModelConfig) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that quantise a model on this process's device."""
    if config.quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    device = PartialState().device
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    require_support(config.quantization, device, dtype)
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    how = BitsAndBytesConfig(
        load_in_8bit=config.quantization == "8bit",
        load_in_4bit=config.quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if has_bfloat16 else torch.float32,
    )
    return {"quantization_config": how, "device_map": {"": device}}


def require_quantized(model: nn.Module, config: ModelConfig) -> None:
    """Refuse a model without a quantised layer, if `model.quantization` asks for them; keep
    bitsandbytes from changing the layers later, in place."""
    if config.quantization is None:
        return
    quantized: list[Any] = [module for module in model.modules() if is_quantized(module)]
    if not quantized:
        kinds = {type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear)}
        raise InputError(
            f"model.quantization={config.quantization}: transformers quantises none of the layers "
            f"of {type(model).__name__} ({', '.join(sorted(kinds))}); set model.quantization=null"
        )
    for module in quantized:
        # On some CPUs the first forward pass in eval mode would round the scales to bfloat16, so
        # that the model would differ from the one in training.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def require_trainable(model: nn.Module, config: ModelConfig, peft: PeftConfig) -> None:
    """Refuse to train all weights of a model that is stored in 8 or 4 bits: only its embeddings and
    norms would train."""
    if not peft.enabled and any(is_quantized(module) for module in model.modules()):
        raise InputError(
            f"model.path={config.path} is stored in 8 or 4 bits, and such weights cannot be "
            "trained: set peft=lora, or take the model that is not quantised"
        )


def is_quantized(module: Any) -> bool:
    """True for a layer of bitsandbytes, but not for LoRA's layer around one."""
    weight = vars(module).get("_parameters", {}).get("weight")
    return type(weight).__name__ in ("Int8Params", "Params4bit")


def undo_first_pass(model: nn.Module) -> None:
    """Move the scales of 8-bit layers back to where they were before the first forward pass, in
    place: the weights of a checkpoint can only be loaded there."""
    layers: list[Any] = [m for m in model.modules() if is_quantized(m) and hasattr(m, "state")]
    for layer in layers:  # of 8 bits
        if layer.state.SCB is not None:
            layer.weight.CB, layer.weight.SCB = layer.state.CB, layer.state.SCB
            layer.state.CB = layer.state.SCB = None


def dequantized_weight(layer: Any) -> Tensor:
    """Return the weight of a quantised layer in floating point, (outputs, inputs).

    `peft.utils.integrations.dequantize_module_weight` loses the scales of an 8-bit layer on a CPU.
    """
    from bitsandbytes import functional

    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    scales = weight.SCB if layer.state.SCB is None else layer.state.SCB  # moved by the first pass
    return functional.int8_vectorwise_dequant(weight.data, scales)


def require_support(quantization: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a device on which a small layer cannot run forward and backward. Its inputs are large
    enough to take LLM.int8's outlier path."""
    try:
        import bitsandbytes as bnb

        layer: Any
        if quantization == "8bit":
            layer = bnb.nn.Linear8bitLt(64, 64, False, has_fp16_weights=False, threshold=6.0)
        else:
            layer = bnb.nn.Linear4bit(64, 64, False, quant_type="nf4")
        inputs = torch.full((1, 1, 64), 10.0, device=device, dtype=dtype, requires_grad=True)
        layer.to(device).eval()(inputs.relu()).sum().backward()
    except Exception as error:  # a missing or broken backend can raise anything
        raise InputError(
            f"model.quantization={quantization}: bitsandbytes cannot train {dtype} activations on "
            f"{device} ({one_line(error)}); use another model.dtype, or set model.quantization=null"
        ) from error
