"""Policy, reference, reward model and critic, and their forward passes, for the three stages.

Policies are `AutoModelForCausalLM`. Reward models and critics are
`AutoModelForSequenceClassification` with one label, read at every position by `ScalarModel`.
Weights come from safetensors only. Rows are right-padded wherever a model trains or scores; only
the sampler pads on the left.

`load` gives each role its model: `build` makes one from a configuration, `weights` reads one from
files. `adapters` puts LoRA on a model, `plain` takes it off again.
`roles` puts several models on the layers of one base, `footprint` counts the memory of a model.
`forward` holds the forward passes, `head` the log-probs that a causal LM gives to tokens.

Left out: slices of models on several processes (`rlhf.distributed`).
"""

from rlhf.models.adapters import adapter_writer, add_lora, new_token_rows, what_to_save
from rlhf.models.attention import (
    disable_padding_free,
    enable_padding_free,
    is_padding_free,
    watch_windows,
)
from rlhf.models.build import try_settings
from rlhf.models.compiled import compile_blocks, why_not_compiled
from rlhf.models.dropout import disable_dropout
from rlhf.models.embeddings import resize_embeddings
from rlhf.models.footprint import (
    ModelMemory,
    cache_bytes,
    cache_numbers,
    kept_bytes,
    model_memory,
    passing_bytes,
)
from rlhf.models.forward import (
    HEAD,
    ScalarModel,
    TextModel,
    accepts,
    by_row,
    decoder_blocks,
    eval_mode,
    forward_inputs,
    has_linear_head,
    is_causal,
    position_ids_from_mask,
    prefill_inputs,
    sequence_scores,
    unwrap_peft,
    without_padding_mask,
)
from rlhf.models.frozen import round_linear_weights
from rlhf.models.head import (
    Reading,
    choose_chunk_tokens,
    chunk_tokens,
    ends_with_head,
    response_logprobs,
)
from rlhf.models.load import (
    freeze,
    init_reward_model,
    leave_out_router_logits,
    load_policy,
    load_reference,
    load_reward_model,
    parameter_count,
    stored_stop_ids,
)
from rlhf.models.plain import copy_bytes, copy_weights, merged, plain_copy, sliced_copy
from rlhf.models.quantization import is_quantized, require_trainable, undo_first_pass
from rlhf.models.roles import own_parameters, scalar_role, stored_role
from rlhf.models.sampling_settings import (
    mend_sampling_settings,
    sample_as_trained,
    sampling_settings,
)
from rlhf.models.shared_slices import slices_of
from rlhf.models.shared_trunk import SharedTrunk, ValueHead, token_outputs
from rlhf.models.unread import read_weights, shard, shard_base, shard_unread
from rlhf.models.weights import load_adapter

# Names that earlier versions had here.
from rlhf.tokenizer import (
    StopStrings,
    end_token_ids,
    forbidden_token_ids,
    load_tokenizer,
    num_tokens,
    response_text,
)
