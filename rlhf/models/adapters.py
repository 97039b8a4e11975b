"""LoRA adapters on a model, rows of the embedding tables that are trained next to them, and the
plain model again: `merged`. `what_to_save` chooses what a stage writes of both. `weights` merges
adapters from files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import TrainableTokensWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from rlhf.checkpoint import NonFiniteError, find_non_finite_on_any
from rlhf.config import InputError, ModelConfig, PeftConfig, one_line
from rlhf.console import is_main_process
from rlhf.distributed import compute_device, detached, is_sharded, whole
from rlhf.hub import ADAPTER_WEIGHTS
from rlhf.models.attention import is_padding_free
from rlhf.models.forward import HEAD, unwrap_peft
from rlhf.models.quantization import dequantized_weight, is_quantized
from rlhf.models.stacked import kept_delta
from rlhf.models.unread import stand_ins
from rlhf.slices import in_file
from rlhf.tokenizer import stop_strings
from rlhf.zero import gathering

STORED_DTYPE = "_rlhf_stored_dtype"  # attribute of a model: the type of the weights in its files


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


# --- The plain model again ---------------------------------------------------------------------


def merged(model: Any, folder: Path | None = None) -> PreTrainedModel:
    """Return the plain model. If it has adapters, merge them into copies of the weights in main
    memory, after dequantising what bitsandbytes has quantised. The result has the type in which the
    base is stored, if that is smaller than the one of training; a scalar head is not rounded.

    All processes that share a sharded model call this together; only the main one gets a new model,
    which can be written but not run: its weights are in files of `folder`, put together one by one,
    so that no process holds the model.

    Raises:
        NonFiniteError: on all processes, if one has a slice that is not finite.
    """
    if is_sharded(model):
        return _merged_in_files(model, folder)
    if not isinstance(model, PeftModel):
        return model
    base = cast(Any, unwrap_peft(model))
    plain = _empty_plain(base)
    state = {name: _as_stored(base, name, t.cpu()) for name, t in _merged_weights(model, plain)}
    plain.load_state_dict(state)
    for name, parameter in plain.named_parameters():
        # Each in its own dtype: `plain.to` would round a float32 head and the rotary frequencies.
        parameter.data = parameter.data.to(state[name].dtype)
    return plain


def _merged_in_files(model: Any, folder: Path | None) -> PreTrainedModel:
    """`merged` of a model in slices."""
    base = cast(Any, unwrap_peft(model))
    if problem := find_non_finite_on_any(model.named_parameters()):
        raise NonFiniteError(f"the result was not written: {problem}")
    with torch.device("meta"):
        plain = _empty_plain(base)
    state = {}
    for name, tensor in _merged_weights(model, plain):
        if is_main_process():
            state[name] = in_file(_as_stored(base, name, tensor), folder)
    if not is_main_process():
        return base
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    return plain


def _empty_plain(base: Any) -> Any:
    """A model without adapters of the same form, whose weights are yet to come."""
    plain = type(base)(_plain_config(base))
    if any(key.startswith(f"{HEAD}.") and key.endswith(".bias") for key in base.state_dict()):
        plain.score = nn.Linear(plain.score.in_features, 1)  # the families' heads have no bias
    plain.generation_config = getattr(base, "generation_config", None)
    if hasattr(base.base_model, "_rlhf_forward"):  # how it was trained, for its record
        plain.base_model._rlhf_forward = base.base_model._rlhf_forward
    return plain


def _as_stored(base: Any, name: str, tensor: Tensor) -> Tensor:
    """A weight in the type of the base's files, if that is smaller; a head keeps its own."""
    stored: torch.dtype = getattr(base, STORED_DTYPE, torch.float32)
    is_wider = tensor.is_floating_point() and tensor.dtype.itemsize > stored.itemsize
    return tensor.to(stored) if is_wider and not name.startswith(f"{HEAD}.") else tensor


def plain_copy(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Return a second causal LM without adapters on the same device, in this type and in eval mode;
    `copy_weights` writes its weights."""
    base = unwrap_peft(model)
    # our attention is for training alone
    attention = "sdpa" if is_padding_free(base) else base.config._attn_implementation
    with compute_device(base):
        plain = type(base)._from_config(
            _plain_config(base), dtype=dtype, attn_implementation=attention
        )
    plain.generation_config = base.generation_config
    return plain.requires_grad_(False).eval()


def copy_bytes(model: Any, dtype: torch.dtype) -> int:
    """Bytes of the weights of `plain_copy`."""
    with torch.device("meta"):
        plain = _empty_plain(unwrap_peft(model))
    return sum(weight.numel() for weight in plain.parameters()) * dtype.itemsize


@torch.no_grad()
def copy_weights(model: Any, plain: nn.Module, with_adapter: bool = True) -> None:
    """Write the weights of a model, its adapter merged or left out, into one from `plain_copy`, in
    place."""
    targets = plain.state_dict()
    for name, tensor in _merged_weights(model, plain, with_adapter):
        targets[name].copy_(tensor)


def _plain_config(base: Any) -> Any:
    config = copy.deepcopy(base.config)
    config.__dict__.pop("quantization_config", None)
    return config


def _merged_weights(
    model: Any, plain: nn.Module, with_adapter: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of the plain model's weights, one after the other; what an adapter adds
    to comes a second time, with it."""
    base = unwrap_peft(model)
    names = plain.state_dict().keys()  # leaves out adapters, and the scales of quantised weights
    if not isinstance(model, PeftModel):
        weights = base.state_dict(keep_vars=True)
        yield from ((k, whole(detached(v))) for k, v in weights.items() if k in names)
        return
    adapter = model.active_adapter
    packed = {name for name, module in base.named_modules() if is_quantized(module)}
    state = {}
    for key, value in base.state_dict(keep_vars=True).items():
        name = key.replace(f".modules_to_save.{adapter}", "")
        name = name.replace(".token_adapter", "").replace(".base_layer", "")
        if name in names and ".original_module" not in key and key.rpartition(".")[0] not in packed:
            state[name] = detached(value)
    yield from ((key, whole(value)) for key, value in state.items())
    for name, module in base.named_modules():
        if isinstance(module, TrainableTokensLayer) and with_adapter:
            table = whole(detached(cast(Any, module.get_base_layer()).weight))
            rows = whole(detached(module.trainable_tokens_delta[adapter])).to(table)
            index = torch.tensor(module.token_indices[adapter], device=table.device)
            weight = table.index_copy(0, index, rows)
            yield f"{name.removesuffix('.token_adapter')}.weight", weight
        elif isinstance(module, LoraLayer) and not is_quantized(module.get_base_layer()):
            # PEFT wraps a layer of experts once for each weight: experts, experts.base_layer
            key = f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}"
            deltas = [kept_delta(module.get_base_layer())]
            if with_adapter:
                layer = cast(Any, module)
                with gathering(p for n, p in layer.named_parameters() if "lora_" in n):
                    deltas.append(layer.get_delta_weight(adapter).detach())
            added = sum(whole(delta) for delta in deltas if delta is not None)
            yield key, (whole(state[key]) + added).to(state[key].dtype)
        elif (kept := kept_delta(module)) is not None and f"{name}.weight" in state:
            # no adapter that trains is on this layer
            value = whole(state[f"{name}.weight"])
            yield f"{name}.weight", (value + kept).to(value.dtype)
    yield from _dequantized_weights(base, adapter if with_adapter else None, plain)


def _dequantized_weights(
    base: Any, adapter: str | None, plain: nn.Module
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the quantised layers in floating point, with what the adapter adds."""
    for name, module in base.named_modules():
        layer: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if not is_quantized(layer) or name.endswith(".base_layer"):
            continue
        weight = dequantized_weight(layer)
        if (kept := kept_delta(layer)) is not None:
            weight = weight + kept
        if layer is not module and adapter is not None:
            weight = weight + cast(Any, module).get_delta_weight(adapter).detach()
        if isinstance(plain.get_submodule(name), Conv1D):
            weight = weight.T.contiguous()  # GPT-2 stores its weights transposed
        yield f"{name}.weight", weight.to(base.dtype)
        if layer.bias is not None:  # bitsandbytes casts it to its compute dtype
            yield f"{name}.bias", layer.bias.detach().to(base.dtype)


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
