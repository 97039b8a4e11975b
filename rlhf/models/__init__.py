"""THE model-loading layer: tokenizer, policy, reference, reward model, critic, forward passes.

One layer serves the three stages: a Hub id, a local directory or a stage directory goes in.
Policies are `AutoModelForCausalLM`; reward models and critics are
`AutoModelForSequenceClassification` with one label, read at every position by `ScalarModel`.
Weights come from safetensors only; pickled weights are refused. Sequences are laid out as
[left-padded prompt | right-padded response], in sampling and in training alike, so that both see
the same positions.

Left out: sharded models.
"""

from rlhf.models.adapters import add_lora, merged, new_token_rows
from rlhf.models.answers import StopStrings, before_stop, response_text
from rlhf.models.dropout import disable_dropout
from rlhf.models.forward import (
    HEAD,
    ScalarModel,
    accepts,
    forward_inputs,
    position_ids_from_mask,
    response_logits,
    sequence_scores,
    unwrap_peft,
)
from rlhf.models.loading import (
    freeze,
    init_reward_model,
    load_policy,
    load_reference,
    load_reward_model,
    parameter_count,
    use_bfloat16,
)
from rlhf.models.sampling_settings import (
    mend_sampling_settings,
    sample_as_trained,
    sampling_settings,
)
from rlhf.models.vocabulary import (
    PAD_TOKEN,
    forbidden_token_ids,
    load_tokenizer,
    num_tokens,
    resize_embeddings,
)

__all__ = [
    "HEAD",
    "PAD_TOKEN",
    "ScalarModel",
    "StopStrings",
    "accepts",
    "add_lora",
    "before_stop",
    "disable_dropout",
    "forbidden_token_ids",
    "forward_inputs",
    "freeze",
    "init_reward_model",
    "load_policy",
    "load_reference",
    "load_reward_model",
    "load_tokenizer",
    "merged",
    "mend_sampling_settings",
    "new_token_rows",
    "num_tokens",
    "parameter_count",
    "position_ids_from_mask",
    "resize_embeddings",
    "response_logits",
    "response_text",
    "sample_as_trained",
    "sampling_settings",
    "sequence_scores",
    "unwrap_peft",
    "use_bfloat16",
]
