"""A value head on the policy's trunk: one forward pass gives log-probs, entropy and values.

The head reads the hidden states that the output head reads. Policy and values then share all other
weights, so that the value loss also moves the policy. That is another algorithm than a critic of
its own; Ziegler et al. 2019 (arXiv 1909.08593, openai/lm-human-preferences) and TRL's
`AutoModelForCausalLMWithValueHead` train so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.head import Reading, response_logprobs


class ValueHead(nn.Module):
    """A linear layer from hidden states to values, float32 also under autocast; it begins at 0."""

    def __init__(self, policy: Any, trunk_coef: float):
        """Fit the policy's output head.

        Args:
            trunk_coef: factor of the gradient that goes on into the hidden states.
        """
        super().__init__()
        width = policy.get_output_embeddings().weight.shape[1]
        self.linear, self.trunk_coef = nn.Linear(width, 1), trunk_coef
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Return one value for each of (N, H) states, (N,) float32."""
        fixed = states.detach().float()
        with torch.autocast(states.device.type, enabled=False):
            # the numbers of the states, with a share of their gradient
            scaled = fixed + self.trunk_coef * (states.float() - fixed)
            return self.linear(scaled).squeeze(-1)


class SharedTrunk(nn.Module):
    """A policy and its value head as one module, whose forward pass a distributed wrapper sees."""

    def __init__(self, policy: Any, head: ValueHead):
        super().__init__()
        self.policy, self.head = policy, head

    def forward(self, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
        """As `response_logprobs`, and values of the states before the tokens, 0 where unwanted."""
        states: list[Tensor] = []
        logprobs, entropy = response_logprobs(self.policy, reading, states.append)
        wanted = reading.wanted.nonzero(as_tuple=True)
        values = torch.zeros_like(logprobs).index_put(wanted, self.head(states[0]))
        return logprobs, entropy, values


def token_outputs(model: Any, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy and values of response tokens; the values are 0 without a value head.

    Args:
        model: a causal LM or a `SharedTrunk`, possibly wrapped.
    """
    if isinstance(getattr(model, "module", model), SharedTrunk):
        return model(reading)
    logprobs, entropy = response_logprobs(model, reading)
    return logprobs, entropy, torch.zeros_like(logprobs)
