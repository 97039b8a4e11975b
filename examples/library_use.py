"""The stages as a library: SFT on a data format of your own, PPO with a scorer of your own.

    python examples/library_use.py [runs_dir]

About a minute on a laptop CPU. The custom format reads rows `{"question": ..., "answer": ...}`; the
custom scorer is any function of prompts and responses.
"""

import json
import sys
import tempfile
from pathlib import Path

from rlhf import PPOConfig, PPOStageConfig, SFTStageConfig, train_ppo, train_sft
from rlhf.config import CriticConfig, DatasetConfig, EvaluationConfig, ModelConfig
from rlhf.demo.world import MODEL_CONFIG, rows


def questions(row: dict) -> dict:
    """A data format: from a row of your file to TRL's `messages`."""
    return {
        "messages": [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    }


def thanks(prompts: list, responses: list[str]) -> list[float]:
    """A scorer: 1 for an answer that says thanks."""
    return [float("thanks" in response) for response in responses]


def main(runs_dir: str) -> None:
    file = Path(runs_dir) / "questions.jsonl"
    demonstrations = [row["messages"] for row in rows("sft", "train")[:2000]]
    pairs = [{"question": q["content"], "answer": a["content"]} for q, a in demonstrations]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = DatasetConfig(path=str(file), format=f"{__name__}.questions", max_length=64)

    tokenizer = "python:rlhf.demo.world.build_tokenizer"
    sft = SFTStageConfig(runs_dir=runs_dir, dataset=data, response_length=24)
    sft.model = ModelConfig(config=MODEL_CONFIG, tokenizer=tokenizer)
    sft.trainer |= {"num_train_epochs": 2, "learning_rate": 2e-3, "warmup_steps": 5}
    print(train_sft(sft))

    ppo = PPOStageConfig(runs_dir=runs_dir, dataset=data, critic=CriticConfig("policy", 1e-3))
    ppo.ppo = PPOConfig(num_updates=12, response_length=24, learning_rate=3e-4)
    ppo.evaluation = EvaluationConfig(every=6)
    result = train_ppo(ppo, scorer=thanks)
    print(result)  # its score is the share that says thanks
    print(f"scores by update: {[row['score'] for row in result.metrics if 'score' in row]}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
