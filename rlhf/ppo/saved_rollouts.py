"""Training rollouts as files: one row per response, for people and for `datasets`.

    datasets.load_dataset("json", data_files="runs/mine/ppo/rollouts/*.jsonl", split="train")

`ppo.save_rollouts` says how often. A resumed run writes the same files again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf.ppo.rollout import Experience
from rlhf.tokenizer import response_text

PER_TOKEN = ("response_ids", "logprobs", "ref_logprobs", "values", "advantages", "returns")


def write_rollout(
    directory: Path,
    update: int,
    prompts: Sequence[Any],
    batch: Experience,
    scores: Tensor,
    tokenizer: Any,
) -> None:
    """Write `directory/rollouts/update-<update>.jsonl`, whole or not at all.

    Args:
        update: number of the update, from 1, as in `metrics.jsonl`.
        prompts: canonical prompts, text or messages, one per row of the batch. If there are both,
            messages are written as JSON text: a column of a table has one type.
        scores: (B,) as in the metric `score`.
    """
    file = directory / "rollouts" / f"update-{update:06d}.jsonl"
    file.parent.mkdir(exist_ok=True)
    mixed = len({type(prompt) for prompt in prompts}) > 1
    tensors = {name: getattr(batch, name) for name in PER_TOKEN}
    tensors |= {"token_kl": batch.kl, "rewards": batch.rewards}
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        for i, prompt in enumerate(prompts):
            length = int(batch.lengths[i])
            tokens = {name: tensor[i, :length].tolist() for name, tensor in tensors.items()}
            row = {
                "update": update,
                "prompt": json.dumps(prompt) if mixed and not isinstance(prompt, str) else prompt,
                "response": response_text(tokens["response_ids"], tokenizer),
                "finished": bool(batch.finished[i]),
                "score": float(scores[i]),
                "kl": sum(tokens["token_kl"]),  # nats
                "response_length": length,
            }
            stream.write(json.dumps(row | tokens) + "\n")
    os.replace(temporary, file)
