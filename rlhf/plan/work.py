"""Time of a run: its arithmetic and its memory traffic, against those of a card.

With N parameters, a token costs 2 N operations forward and 4 N backward (Kaplan et al. 2020; tables
in which tokens are looked up, and experts that a token does not take, cost none), and attention 4 x
blocks x width of the queries x length forward and twice that backward (Chowdhery et al. 2022,
appendix B; half of it is masked, and counted). With LoRA the backward pass needs no gradients of
the frozen weights: 2 N. Gradient checkpointing reads forward once more. A sampling step reads the
weights and the cache once, in bfloat16, and takes at least as long as that; from slices, also what
it takes to receive those of the other GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rlhf.models import decoder_blocks
from rlhf.plan.cards import Card
from rlhf.plan.counting import HALF, Measured, multiplied, query_width
from rlhf.plan.launches import Setting


@dataclass
class Known:
    """A published run. Tokens of a row are our assumption."""

    name: str
    size: str
    stage: str
    rows: int  # examples, or episodes
    epochs: int
    prompt: int
    response: int = 0


# Rows and epochs are those of the sources that docs/recipes.md names; InstructGPT had no 70 B.
KNOWN = (
    Known("Alpaca 7B, SFT", "llama-7b", "sft", 52_002, 3, 115),
    Known("Vicuna 13B, SFT", "llama-13b", "sft", 70_000, 3, 2048),
    Known("Dolly 12B, SFT", "pythia-12b", "sft", 15_011, 2, 200),
    Known("InstructGPT 1.3B, PPO", "opt-1.3b", "ppo", 256_000, 1, 256, 256),
    Known("InstructGPT 6B, PPO", "opt-6.7b", "ppo", 256_000, 1, 256, 256),
    Known("InstructGPT's episodes at 70B, PPO", "llama-2-70b", "ppo", 256_000, 1, 256, 256),
)


@dataclass
class Shape:
    """What the arithmetic of a model depends on."""

    parameters: int
    multiplied: int  # as `Measured` has it
    blocks: int
    width: int
    cache_per_token: int

    @classmethod
    def of(cls, model: Measured) -> Shape:
        sizes = model.parameters, model.multiplied, model.num_blocks, model.width
        return cls(*sizes, model.cache_per_token)

    @classmethod
    def of_settings(cls, settings: PreTrainedConfig) -> Shape:
        """Count a model's parameters, and two numbers per value of the cache of each token."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
        heads, width = settings.num_attention_heads, query_width(settings)
        kept = getattr(settings, "num_key_value_heads", None) or heads
        blocks = len(decoder_blocks(model))
        parameters = sum(p.numel() for p in model.parameters())
        cache = 2 * HALF * blocks * width // heads * kept
        return cls(parameters, multiplied(model), blocks, width, cache)

    def forward(self, tokens: float, length: int) -> float:
        """Operations of a forward pass over tokens, in rows of a length."""
        return tokens * (2 * self.multiplied + 4 * self.blocks * self.width * length)


def train_operations(shape: Shape, setting: Setting, tokens: float) -> float:
    """Operations of a forward and a backward pass."""
    forward = shape.forward(tokens, setting.length)
    backward = forward if setting.lora else 2 * forward
    return forward * (1 + setting.checkpointing) + backward


def seconds_of_phases(
    shape: Shape, setting: Setting, card: Card, rows: int, epochs: int
) -> dict[str, float]:
    """Seconds of each phase on all GPUs together, at the limits of the card.

    Args:
        rows: examples, or episodes of PPO.
        epochs: passes over the examples; in PPO, over each rollout.
    """
    rate = card.tera * 1e12 * setting.gpus
    tokens = rows * setting.length
    trained = train_operations(shape, setting, tokens * epochs)
    if setting.stage != "ppo":
        return {"train": trained / rate}
    forward = shape.forward(tokens, setting.length)
    num_models = 1 + setting.critic
    step = setting.sampled_rows * setting.gpus  # rows of one sampling step
    context = setting.prompt_length + setting.response_length / 2
    traffic = HALF * shape.parameters + setting.sampled_rows * context * shape.cache_per_token
    decode = max(traffic / (card.bandwidth * 1e9), shape.forward(step, int(context)) / rate)
    prefill = shape.forward(rows * setting.prompt_length, setting.prompt_length) / rate
    return {
        "sample": prefill + rows / step * setting.response_length * decode,
        # old log-probs, reference, reward model, and the critic's values
        "score": (2 + num_models) * forward / rate,
        "train": num_models * trained / rate,
    }


def seconds_of_gathering(size: int, setting: Setting, card: Card, rows: int) -> tuple[float, float]:
    """Seconds for a GPU to receive the slices of the others, for a token, and for those of a run.

    Args:
        size: bytes of the slices of all GPUs.
        rows: episodes of PPO.
    """
    token = size * (setting.gpus - 1) / setting.gpus / (card.link * 1e9)
    return token, rows / (setting.sampled_rows * setting.gpus) * setting.response_length * token
