"""Tiny models written as GGUF files, as llama.cpp would write them."""

from pathlib import Path
from typing import Any

import gguf
import torch

NORMAL, CONTROL = 1, 3  # kinds of tokens


def write_gguf(file: Path, model: Any, tokenizer: Any, kind: str = "F32", **metadata: Any) -> Path:
    """Write a Llama with a byte-level BPE tokenizer.

    Args:
        kind: how tables and layers are stored, e.g. Q8_0; norms are F32.
        metadata: further values of the header, e.g. split_count=2.
    """
    config = model.config
    writer = gguf.GGUFWriter(file, metadata.pop("architecture", "llama"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, value in metadata.items():
        writer.add_uint32(name.replace("_", ".", 1), value)
    _add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        weight = _permuted(name, tensor, config).numpy()
        own = stored if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(weight, own)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: Any, tokenizer: Any) -> None:
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in special else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _permuted(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Reorder the rows of queries and keys as llama.cpp rotates them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for layer, num_heads in heads.items():
        if f".{layer}." in name:
            halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
            return halves.swapaxes(1, 2).reshape(weight.shape).contiguous()
    return weight
