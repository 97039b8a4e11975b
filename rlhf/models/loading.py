"""Loading and building: tokenizer, policy, reference, reward model; adapters and embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.config import InputError, ModelConfig, PeftConfig, load_object
from rlhf.models.forward import HEAD

PAD_TOKEN = "<|pad|>"


# --- Tokenizer ----------------------------------------------------------------------------------


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with a pad token of its own and a chat template.

    A missing pad token, or one equal to EOS, is replaced by a new `<|pad|>`: PPO never samples the
    pad token, and libraries that look for "the last token that is not pad" would otherwise miss the
    EOS.

    Args:
        config: `tokenizer` (falls back to `path`) is a Hub id, a directory or
            `python:module.function`; `chat_template` is set when given, else the tokenizer's own is
            kept, else `plain` is used.

    Raises:
        InputError: nothing can be loaded from there, or the tokenizer has no EOS token.
    """
    from rlhf.data import chat_template_text

    source = config.tokenizer or config.path
    assert source is not None
    if source.startswith("python:"):
        tokenizer = load_object(source, "model.tokenizer")()
    else:
        tokenizer = _from_hub_or_disk(
            AutoTokenizer.from_pretrained,
            source,
            "model.tokenizer" if config.tokenizer else "model.path",
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {source} has no EOS token; set it in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if config.chat_template is not None:
        tokenizer.chat_template = chat_template_text(config.chat_template)
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = chat_template_text("plain")
    return tokenizer


def forbidden_token_ids(tokenizer: PreTrainedTokenizerBase, num_logits: int) -> Tensor:
    """Ids that a policy never emits: the pad token and the padded rows of the embedding table.

    Their logits become -inf in sampling and in every log-prob alike.

    Args:
        num_logits: width of the language-model head.
    """
    ids = set(range(num_tokens(tokenizer), num_logits))
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        ids.add(tokenizer.pad_token_id)
    return torch.tensor(sorted(ids), dtype=torch.long)


def num_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding table needs: the largest id + 1, which is more than the number of
    tokens where ids are left out."""
    return max(tokenizer.get_vocab().values()) + 1


# --- Loading ------------------------------------------------------------------------------------


def load_policy(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load or build a causal language model whose embedding table covers the tokenizer.

    Args:
        config: `path` is a Hub id or a directory (an adapter directory is merged into its base);
            without it the model is built from `config.config`, with random weights.

    Raises:
        InputError: nothing can be loaded from there, only pickled weights are there, or
            `model.config` is not valid.
    """
    if config.path is None:
        model = _build(config, tokenizer)
    else:
        model = _from_hub_or_disk(
            _load_causal_lm, config.path, "model.path", **_load_arguments(config)
        )
    resize_embeddings(model, num_tokens(tokenizer))
    _set_special_tokens(model, tokenizer)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def load_reference(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load a frozen copy of the starting policy, from disk: never a deepcopy of a trained model.

    TRL's SFTTrainer patches `forward` on the instance; a deepcopy of it keeps calling the original
    model and so follows the policy.
    """
    reference = load_policy(config, tokenizer)
    return freeze(reference)


def init_reward_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """Put a fresh scalar head on the backbone of a policy.

    Head weights are drawn from N(0, 1/sqrt(d + 1)) with d the hidden size (Stiennon et al. 2020,
    appendix B.1), kept in float32.
    """
    assert config.path is not None
    model = _load_classifier(config, "model.path")
    resize_embeddings(model, num_tokens(tokenizer))
    _set_special_tokens(model, tokenizer)
    head = getattr(model, HEAD)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features + 1)
    model.score = nn.Linear(head.in_features, 1, bias=False, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.copy_(weight)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def load_reward_model(config: ModelConfig, field: str = "scorer.path") -> PreTrainedModel:
    """Load a trained reward model; its head stays in float32.

    Raises:
        InputError: the directory holds no weights for the scalar head (a fresh head is never
            substituted), or weights of another shape.
    """
    assert config.path is not None
    model, info = _load_classifier(
        config, field, output_loading_info=True, ignore_mismatched_sizes=True
    )
    misfits = {name for name, *_ in info["mismatched_keys"]}
    misfits |= {name for name in info["missing_keys"] if name.startswith(f"{HEAD}.")}
    if misfits:
        raise InputError(
            f"{field}={config.path} has no weights for {', '.join(sorted(misfits))} that fit: it "
            "is not a reward model with one label; give the final/ directory of a reward stage"
        )
    if model.dtype != torch.float32:
        _restore_head(model, Path(config.path))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


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


def freeze(model: Any) -> Any:
    """Switch off gradients and dropout, in place."""
    model.requires_grad_(False)
    disable_dropout(model)
    return model


def disable_dropout(model: nn.Module) -> None:
    """Switch off every dropout, LoRA's too, in place; gradient checkpointing keeps working.

    The model is put in eval mode; checkpointed layers keep `training=True` for themselves (not for
    their children), since transformers only checkpoints layers in training mode.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "hidden_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def resize_embeddings(model: PreTrainedModel, num_rows: int) -> None:
    """Grow the embedding tables to `num_rows` rows, in place; new rows are the mean of the old.

    A table that is already larger (Pythia pads its own) is left alone: its surplus ids are never
    sampled.
    """
    old = cast(Any, model.get_input_embeddings()).weight.shape[0]
    if old >= num_rows:
        return
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    with torch.no_grad():
        for module in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            module.weight[old:] = module.weight[:old].mean(dim=0)


def parameter_count(model: nn.Module) -> tuple[int, int]:
    """Return (all parameters, trainable parameters)."""
    return (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def use_bfloat16(precision: str) -> bool:
    """Decide whether forward passes run under bfloat16 autocast; "auto": on a GPU that has it."""
    if precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return precision == "bfloat16"


def _build(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    values = dict(config.config)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise InputError("model.config has no model_type, e.g. model.config.model_type=llama")
    values.setdefault("vocab_size", num_tokens(tokenizer))
    special = {
        name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    try:
        model_config = AutoConfig.for_model(model_type, **values, **special)
        dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
        return AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, attn_implementation=config.attn_implementation
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"model.config: {error}") from error


def _load_arguments(config: ModelConfig) -> dict[str, Any]:
    return {
        "revision": config.revision,
        "dtype": "auto" if config.dtype == "auto" else getattr(torch, config.dtype),
        "attn_implementation": config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
        "use_safetensors": True,
    }


def _load_causal_lm(path: str, use_safetensors: bool, **kwargs: Any) -> PreTrainedModel:
    if (Path(path) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(path, **kwargs).merge_and_unload()
    kwargs |= {"use_safetensors": use_safetensors, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"there are no weights for {', '.join(sorted(info['missing_keys'])[:3])}")
    return model


def _load_classifier(config: ModelConfig, field: str, **kwargs: Any) -> Any:
    loaded = _from_hub_or_disk(
        AutoModelForSequenceClassification.from_pretrained,
        config.path,
        field,
        num_labels=1,
        **_load_arguments(config),
        **kwargs,
    )
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise InputError(
            f"{field}={config.path}: {type(model).__name__} has no linear head named {HEAD!r}"
        )
    return loaded


def _from_hub_or_disk(load: Callable[..., Any], path: Any, field: str, **kwargs: Any) -> Any:
    directory = Path(str(path))
    if directory.is_dir():
        names = [file.name for file in directory.iterdir()]
        pickled = [
            n
            for n in names
            if n.endswith((".bin", ".pt", ".pth", ".ckpt")) and n != "training_args.bin"
        ]
        if pickled and not any(n.endswith(".safetensors") for n in names):
            raise InputError(
                f"{field}={path} holds pickled weights only ({', '.join(sorted(pickled))}), which "
                "can run code when loaded; convert them with save_pretrained, which writes "
                "safetensors"
            )
    elif str(path).startswith((".", "/")) or str(path).count("/") > 1:
        raise InputError(f"{field}={path}: no such directory")
    try:
        return load(str(path), **kwargs)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:400]
        raise InputError(
            f"{field}={path} cannot be loaded: it is neither a directory here nor a Hub model that "
            f"can be reached ({type(error).__name__}: {reason})"
        ) from error


def _restore_head(model: PreTrainedModel, directory: Path) -> None:
    """Read the head again in float32: a half-precision load rounded it."""
    from safetensors import safe_open

    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            if f"{HEAD}.weight" in tensors.keys():
                weight = tensors.get_tensor(f"{HEAD}.weight").float()
                model.score = nn.Linear(weight.shape[1], 1, bias=False, dtype=torch.float32)
                model.score.weight.data.copy_(weight)


def _set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    holders = [model.config, getattr(model, "generation_config", None)]
    for holder in (h for h in holders if h is not None):
        holder.pad_token_id = tokenizer.pad_token_id
        holder.bos_token_id = tokenizer.bos_token_id
        stop = holder.eos_token_id
        if not isinstance(stop, list) or tokenizer.eos_token_id not in stop:
            holder.eos_token_id = tokenizer.eos_token_id
