"""Training rollouts as files: one row per response, for people and for `datasets`.

    datasets.load_dataset("json", data_files="runs/mine/ppo/rollouts/*.jsonl", split="train")

`ppo.save_rollouts` says how often. A file is a function of the update, so that a resumed run writes
the same files again.
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

PER_TOKEN = ("logprobs", "ref_logprobs", "values", "advantages", "returns")


def write_rollout(
    directory: Path,
    update: int,
    prompts: Sequence[Any],
    batch: Experience,
    scores: Tensor,
    tokenizer: Any,
) -> Path:
    """Write `directory/rollouts/update-<update>.jsonl`, whole or not at all.

    A row has `prompt`, `response`, `finished`, `score`, `kl` (nats, summed over the response), and
    lists with an entry per response token: `response_ids`, `token_kl`, `rewards` and `PER_TOKEN`.

    Args:
        update: number of the update, from 1, as in `metrics.jsonl`.
        prompts: canonical prompts, text or messages, one per row of the batch. Where there are
            both, messages are written as JSON text: a column of a table has one type.
        scores: (B,) as in the metric `score`.
    """
    file = directory / "rollouts" / f"update-{update:06d}.jsonl"
    file.parent.mkdir(exist_ok=True)
    mixed = len({type(prompt) for prompt in prompts}) > 1
    tensors = {name: getattr(batch, name).tolist() for name in ("response_ids", *PER_TOKEN)}
    tensors |= {"token_kl": batch.kl.tolist(), "rewards": batch.rewards.tolist()}
    finished, score_list = batch.finished.tolist(), scores.tolist()
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        for i, (prompt, length) in enumerate(zip(prompts, batch.lengths.tolist(), strict=True)):
            tokens = {name: values[i][:length] for name, values in tensors.items()}
            row = {
                "update": update,
                "prompt": json.dumps(prompt) if mixed and not isinstance(prompt, str) else prompt,
                "response": response_text(tokens["response_ids"], tokenizer),
                "finished": finished[i],
                "score": score_list[i],
                "kl": sum(tokens["token_kl"]),
                "response_length": length,
            }
            stream.write(json.dumps(row | tokens) + "\n")
    os.replace(temporary, file)
    return file
