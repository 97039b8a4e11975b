"""THE model-loading layer: tokenizer, policy, reference, reward model, critic, forward passes.

One layer serves the three stages: a Hub id, a local directory or a stage directory goes in.
Policies are `AutoModelForCausalLM`; reward models and critics are
`AutoModelForSequenceClassification` with one label, read at every position by `ScalarModel`.
Weights come from safetensors only; pickled weights are refused. Rows are right-padded wherever a
model trains or scores; only the sampler pads on the left.

Left out: sharded models.
"""

from rlhf.hub.snapshot import local_directory
from rlhf.hub.source import find_source
from rlhf.models.adapters import add_lora, merged, new_token_rows
from rlhf.models.dropout import disable_dropout
from rlhf.models.embeddings import resize_embeddings
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
from rlhf.models.skeleton import try_settings
from rlhf.models.stored_adapters import load_adapter
