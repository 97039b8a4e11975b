"""THE model-loading layer: tokenizer, policy, reference, reward model, critic, forward passes.

One layer serves the three stages: a Hub id, a local directory or a stage directory goes in.
Policies are `AutoModelForCausalLM`; reward models and critics are
`AutoModelForSequenceClassification` with one label, read at every position by `ScalarModel`.
Weights come from safetensors only; pickled weights are refused. Rows are right-padded wherever a
model trains or scores; only the sampler pads on the left.

Left out: sharded models.
"""

from rlhf.models.adapters import add_lora, merged, new_token_rows
from rlhf.models.answers import StopStrings, before_stop, end_token_ids, response_text
from rlhf.models.dropout import disable_dropout
from rlhf.models.forward import (
    HEAD,
    ScalarModel,
    TextModel,
    accepts,
    forward_inputs,
    has_linear_head,
    inference_mode,
    is_causal,
    position_ids_from_mask,
    prefill_inputs,
    response_logits,
    sequence_scores,
    unwrap_peft,
    without_padding_mask,
)
from rlhf.models.hub import local_directory
from rlhf.models.loading import (
    check_model_config,
    freeze,
    init_reward_model,
    load_policy,
    load_reference,
    load_reward_model,
    parameter_count,
    use_bfloat16,
)
from rlhf.models.quantization import is_quantized, undo_first_pass
from rlhf.models.sampling_settings import (
    mend_sampling_settings,
    sample_as_trained,
    sampling_settings,
)
from rlhf.models.sources import find_source
from rlhf.models.stored_adapters import load_adapter
from rlhf.models.vocabulary import (
    PAD_TOKEN,
    forbidden_token_ids,
    load_tokenizer,
    num_tokens,
    read_tokenizer,
    resize_embeddings,
)

__all__ = [
    "check_model_config",
    "HEAD",
    "PAD_TOKEN",
    "ScalarModel",
    "StopStrings",
    "TextModel",
    "accepts",
    "add_lora",
    "before_stop",
    "disable_dropout",
    "end_token_ids",
    "find_source",
    "forbidden_token_ids",
    "forward_inputs",
    "freeze",
    "has_linear_head",
    "inference_mode",
    "init_reward_model",
    "is_causal",
    "load_adapter",
    "is_quantized",
    "load_policy",
    "load_reference",
    "load_reward_model",
    "load_tokenizer",
    "local_directory",
    "mend_sampling_settings",
    "merged",
    "new_token_rows",
    "num_tokens",
    "parameter_count",
    "position_ids_from_mask",
    "prefill_inputs",
    "read_tokenizer",
    "resize_embeddings",
    "response_logits",
    "response_text",
    "sample_as_trained",
    "sampling_settings",
    "sequence_scores",
    "undo_first_pass",
    "unwrap_peft",
    "use_bfloat16",
    "without_padding_mask",
]
