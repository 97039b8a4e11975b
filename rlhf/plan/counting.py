"""Memory of the models of a stage on one GPU, counted on models without weights.

A model is built under torch's FakeTensorMode, where tensors have shapes and types but no numbers.
Its own forward pass then says what autograd keeps of one and of two rows, under bfloat16 autocast
as on a GPU. Attention keeps what FlashAttention keeps: queries, keys, values, the result, and one
number per query. A family whose attention cannot be replaced keeps what its own code keeps. Experts
of a mixture keep the rows of each projection, whichever of them reads a token.

Left out: temporaries inside operations, CUDA's own memory (about 1 GiB), and fragmentation.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from rlhf.config import InputError, PeftConfig, one_line
from rlhf.functional.tokens import BLOCK
from rlhf.models import (
    add_lora,
    cache_numbers,
    decoder_blocks,
    kept_bytes,
    model_memory,
    passing_bytes,
    unwrap_peft,
)

ATTENTION = EXPERTS = "rlhf_plan"
CHUNK = 1024  # ppo.chunk_tokens
HALF, FLOAT = 2, 4  # bytes of a number in bfloat16 and in float32
PACKED = {"8bit": 1, "4bit": 1 / 2 + 1 / 64}  # as `model_memory` counts them


class _Flash(torch.autograd.Function):
    """Attention without numbers, which keeps what FlashAttention keeps (Dao et al. 2022)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, length, _ = query.shape
        result = query.new_empty(rows, length, heads, value.shape[-1])
        ctx.save_for_backward(
            query, key, value, result, query.new_empty(rows, heads, length).float()
        )
        return result


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any
) -> tuple[Any, None]:
    half = (x.to(torch.bfloat16) for x in (query, key, value))  # as autocast does
    return _Flash.apply(*half), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


class _Grouped(torch.autograd.Function):
    """A projection of rows by the expert of each, without numbers. It keeps the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return rows.new_empty(len(rows), width)


def _experts(experts: Any, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """As `grouped_mm_experts_forward` of transformers, which autocast leaves in the type of the
    experts' weights.

    Args:
        hidden: (tokens, hidden size).
        chosen, shares: (tokens, experts of a token): which, and with what weight.
    """
    experts.share = chosen.shape[1] / experts.num_experts
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    second, order = experts.down_proj, torch.argsort(chosen.flatten())
    rows = hidden[order // chosen.shape[1]].to(first.dtype)
    wide = _Grouped.apply(rows, first, first.shape[2 if experts.is_transposed else 1])
    inner = experts._apply_gate(wide) if experts.has_gate else experts.act_fn(wide)
    result = _Grouped.apply(inner, second, second.shape[2 if experts.is_transposed else 1])
    weighted = (result * shares.flatten()[order, None])[torch.argsort(order)]
    return weighted.view(*chosen.shape, -1).sum(dim=1).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts)


@dataclass
class Measured:
    """A causal language model that trains. A scalar model differs from it by its small head."""

    parameters: int
    multiplied: int  # parameters, see `multiplied`
    trained: int
    weights: int  # bytes, as stored
    copies: int  # bytes that autocast makes of weights, for one forward and backward pass
    per_row: int  # bytes that autograd keeps of a row in the decoder blocks
    input_per_row: int  # bytes of the input of one block; float32, as residuals are under autocast
    passing: int  # bytes that a pass over a row without gradients holds at most
    cache_per_token: int  # bytes of keys and values in bfloat16
    num_blocks: int
    block: int  # parameters of the largest one
    width: int  # numbers in the queries of a token, of one block
    vocabulary: int

    def kept(self, rows: int, checkpointing: bool) -> int:
        """Bytes that autograd keeps of rows; with checkpointing, the input of each block, and what
        one block keeps while it is computed again."""
        if not checkpointing:
            return rows * self.per_row
        return rows * (self.num_blocks * self.input_per_row + self.per_row // self.num_blocks)

    def logits(self, tokens: int) -> int:
        """Bytes of the logits of a chunk in bfloat16, of their gradient, and of float32 blocks."""
        chunk = min(tokens, CHUNK)
        return (2 * chunk * HALF + 2 * min(BLOCK, chunk) * 4) * self.vocabulary


def measure(
    settings: PreTrainedConfig, length: int, lora: bool, dtype: str, quantization: str | None = None
) -> Measured:
    """Measure a causal language model that trains on rows of `length` tokens.

    Args:
        lora: only adapters train, on all linear layers with the rank of `peft=lora`.
        dtype: type of the stored weights; adapters are float32.
        quantization: of the linear layers below the adapters, as `model.quantization`.

    Raises:
        InputError: the model's own code needs real numbers.
    """
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # we say it
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            model = _build(settings, lora, dtype, quantization is not None)
            one, two = (_kept(model, rows, length) for rows in (1, 2))
            cache = _cache_bytes(model)
            passing = _passing(model, 2, length) - _passing(model, 1, length)
        except InputError:
            raise
        except Exception as error:  # a model's own code can raise anything without numbers
            raise InputError(
                f"{settings.model_type}: memory cannot be reckoned from the configuration alone "
                f"({one_line(error)}); preflight=only measures it on the model"
            ) from error
        plain = unwrap_peft(model)
        blocks, text = decoder_blocks(plain), settings.get_text_config()
        memory = model_memory(model)
        if quantization is not None:
            numbers = sum(module.weight.numel() for module in _quantized(model))
            memory.weights -= int((HALF - PACKED[quantization]) * numbers)
        return Measured(
            parameters=sum(p.numel() for p in model.parameters()),
            multiplied=multiplied(model),
            trained=memory.gradients // FLOAT,
            weights=memory.weights,
            copies=2 * one - two,
            per_row=two - one,
            input_per_row=FLOAT * length * text.hidden_size,
            passing=passing,
            cache_per_token=cache,
            num_blocks=len(blocks),
            block=max(sum(p.numel() for p in block.parameters()) for block in blocks),
            width=query_width(text),
            vocabulary=plain.get_output_embeddings().weight.shape[0],
        )


def multiplied(model: Any) -> int:
    """Parameters by which the numbers of a token are multiplied: all without the tables in which it
    is looked up, and without the experts that it does not take (known after a forward pass)."""
    plain, outside = unwrap_peft(model), 0.0
    head = plain.get_output_embeddings().weight
    for module in plain.modules():
        own = [p for p in module.parameters(recurse=False) if p is not head]
        if isinstance(module, nn.Embedding):
            outside += sum(p.numel() for p in own)
        elif hasattr(module, "share"):
            outside += sum(p.numel() for p in own) * (1 - module.share)
    return sum(p.numel() for p in model.parameters()) - int(outside)


def query_width(text: Any) -> int:
    """Numbers in the queries of a token; text: the configuration of a language model."""
    size = getattr(text, "head_dim", None)
    return size * text.num_attention_heads if size else text.hidden_size


def _quantized(model: Any) -> list[Any]:
    """The linear layers of a model below LoRA that bitsandbytes would quantise."""
    head = unwrap_peft(model).get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    return [layer for layer in layers if not layer.weight.requires_grad]


def _build(settings: PreTrainedConfig, lora: bool, dtype: str, is_packed: bool) -> Any:
    """Build a model on the meta device, which PEFT can adapt, and give it tensors without numbers
    of a CPU, which has autocast. Packed weights are bfloat16 here: autocast makes no copy of
    either."""
    with torch.device("meta"):
        own = copy.deepcopy(settings)  # it gets our attention and experts
        model: Any = AutoModelForCausalLM.from_config(own, dtype=getattr(torch, dtype))
        if not decoder_blocks(model):
            raise InputError(
                f"{type(model).__name__} has no decoder blocks; look at its config.json"
            )
        model.set_attn_implementation(ATTENTION)
        model.set_experts_implementation(EXPERTS)
        if lora:
            model = add_lora(model, PeftConfig(enabled=True), "CAUSAL_LM")
    packed = {id(layer.weight) for layer in (_quantized(model) if is_packed else ())}
    fakes: dict[int, Any] = {}  # tied weights stay one tensor
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            key = id(tensor)
            if key not in fakes:
                fakes[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    kind = torch.bfloat16 if key in packed else tensor.dtype
                    kind = torch.float32 if lora and tensor.requires_grad else kind
                    fakes[key] = nn.Parameter(fakes[key].to(kind), tensor.requires_grad)
            place = module._parameters if name in module._parameters else module._buffers
            place[name] = fakes[key]
    return model.eval()  # dropout would keep its masks, and the stages switch it off


def _forward(model: Any, rows: int, length: int, **options: Any) -> Any:
    """Read rows. Without a mask most families look at the numbers of the positions; with a mask of
    four dimensions they do not, but others take only one of two."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    trunk = unwrap_peft(model).base_model
    with torch.autocast("cpu", torch.bfloat16):
        try:
            return trunk(input_ids=ids, **options)
        except DataDependentOutputException:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool)
            return trunk(input_ids=ids, attention_mask=mask, **options)


def _kept(model: Any, rows: int, length: int) -> int:
    return kept_bytes(lambda: _forward(model, rows, length, use_cache=False), model)


def _passing(model: Any, rows: int, length: int) -> int:
    return passing_bytes(lambda: _forward(model, rows, length, use_cache=False))


@torch.no_grad()
def _cache_bytes(model: Any) -> int:
    """Bytes of keys and values of a token, as a sampler in bfloat16 keeps them; 0 of a
    state-space model."""
    result = _forward(model, 1, 16, use_cache=True)
    if not hasattr(result, "past_key_values"):
        return 0
    if result.past_key_values is None:
        raise InputError(
            f"model_type={unwrap_peft(model).config.model_type} keeps no keys and values of "
            "earlier tokens: it is no causal language model, which all stages train"
        )
    return HALF * cache_numbers(result.past_key_values) // 16
