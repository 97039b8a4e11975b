"""LoRA adapters, and the rows of new tokens: put on a model, merged into its weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from rlhf.config import InputError, ModelConfig, PeftConfig
from rlhf.models.forward import HEAD
from rlhf.models.quantization import dequantized_weight, is_quantized
from rlhf.tokenizer import stop_strings


def new_token_rows(
    tokenizer: PreTrainedTokenizerBase, model: ModelConfig, config: PeftConfig
) -> list[int]:
    """Ids of `model.special_tokens` whose rows are trained next to the adapters.

    With `peft.train_new_tokens=auto` these are all of them where one is the EOS, a stop string or a
    part of the chat template, and else none. All new rows are equal at first: a model that cannot
    train them cannot tell one new token from another.
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
        token_rows: rows of the embedding tables, input and output, that are trained too.

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
    """As `add_lora`, with the random numbers as they come and PEFT's own layers."""
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
    except ValueError as error:  # no linear layers, or of a kind that it cannot adapt
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"peft.target_modules={config.target_modules or 'null'}: PEFT puts no adapters on "
            f"{type(model).__name__} ({reason}); name some of its linear layers, "
            f"{', '.join(_linear_names(model)) or 'of which it has none'}, or train in full"
        ) from error


def _tables(model: PreTrainedModel, rows: Sequence[int]) -> dict[str, list[int]]:
    """Name of each embedding table -> its rows that are trained; PEFT adds a tied head itself."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    if tables[1] is not None and model.config.tie_word_embeddings:
        tables.pop()
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(table)]: list(rows) for table in tables if table is not None and rows}


class _TableRows(TrainableTokensWrapper):
    """As PEFT's wrapper of an embedding table, but every attribute of the table can be read: TRL
    reads the bias of the head."""

    def _hasattr_wrapped(self, name: str, modules: Any) -> bool:
        return True

    def _getattr_wrapped(self, name: str, modules: Any) -> Any:
        if name == "weight":
            return super()._getattr_wrapped(name, modules)
        return getattr(modules["token_adapter"].get_base_layer(), name)


class _Rows(TrainableTokensLayer):
    """As PEFT's layer, but a head keeps its bias (GPT-J and Phi have one)."""

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
    """Full names of the linear layers, without the heads."""
    heads = (model.get_output_embeddings(), getattr(model, HEAD, None))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and all(module is not head for head in heads)
    ]


def _linear_names(model: PreTrainedModel) -> list[str]:
    """The last parts of their names, each once: what `peft.target_modules` takes."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in _linear_layers(model)))


def merged(model: Any) -> PreTrainedModel:
    """Return the plain model; adapters, if there are any, are merged into copies of the weights in
    main memory, and what bitsandbytes has quantised is dequantised first."""
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


def _merged_state(base: nn.Module, adapter: str, plain: nn.Module) -> dict[str, Tensor]:
    """Weights of the plain model: copies in main memory, with the adapter's share added."""
    names = plain.state_dict().keys()  # leaves out adapters, and the scales of quantised weights
    state = {}
    for key, value in base.state_dict().items():
        name = key.replace(f".modules_to_save.{adapter}", "")
        name = name.replace(".token_adapter", "").replace(".base_layer", "")
        if name in names and ".original_module" not in key:
            state[name] = value.detach().to("cpu", copy=True)
    for name, module in base.named_modules():
        if isinstance(module, TrainableTokensLayer):
            weight = module.get_merged_weights([adapter]).detach()
            state[f"{name.removesuffix('.token_adapter')}.weight"] = weight.to("cpu", copy=True)
        if name.endswith(".base_layer") and not isinstance(module, LoraLayer):
            continue
        # PEFT wraps a layer of experts once for each of its weights: experts, experts.base_layer
        key = f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}"
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
