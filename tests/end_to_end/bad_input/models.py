"""Models and hand-off"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from bad_input import Case
from bad_input.world import edit_json, spoil_weights, write_model, write_templates

SPLIT = "dataset.eval_fraction=0.3 dataset.max_length=64"
SFT = f"rlhf.sft dataset=prompt_completion dataset.path=rows.jsonl run_name=new {SPLIT}"
REWARD = f"rlhf.reward dataset=ranked dataset.path=ranked.jsonl {SPLIT}"
PPO = f"rlhf.ppo dataset=prompt_completion dataset.path=prompts.jsonl run_name=new {SPLIT}"
MINE = "model.path=runs/mine/sft/final scorer.path=runs/mine/reward/final"
OWN_SCORER = "model.path=runs/mine/sft/final scorer=python"

CASES = [
    Case("a directory without a model", f"{SFT} model.path=broken", ("model.path=broken",)),
    Case(
        "a chat template that does not exist",
        f"{SFT} model.path=model model.chat_template=chatmll",
        ("model.chat_template='chatmll'", "plain"),
    ),
    Case(
        "several chat templates, none of them the default",
        f"{SFT} model.path=model",
        ("the chat templates rag, tool_use, and none named default", "model.chat_template=rag"),
        prepare=lambda folder: write_templates(folder / "model/additional_chat_templates"),
    ),
    Case(
        "a chat template that fails",
        f"{SFT} model.path=model dataset.as_conversation=true model.chat_template=mine.jinja",
        ("the chat template refuses a conversation of user", "another model.chat_template"),
        prepare=lambda folder: (folder / "mine.jinja").write_text("{{ messages[0].content + 1 }}"),
    ),
    Case(
        "a chat template with another header before each answer, and no generation prompt",
        f"{SFT} model.path=model dataset.as_conversation=true model.chat_template=mine.jinja",
        ("renders the start of a conversation differently", "model.chat_template=plain"),
        prepare=lambda folder: (folder / "mine.jinja").write_text(
            "{% for m in messages %}<{{ m.role ~ m.content | length }}>{{ m.content }}{% endfor %}"
        ),
    ),
    Case(
        "an EOS token that the tokenizer splits",
        f"{SFT} model.path=model model.eos_token=ending",
        ("model.eos_token", "model.special_tokens"),
    ),
    Case(
        "weights that are not finite",
        f"{SFT} model.path=model",
        ("model.path=model", "model.safetensors: model.norm.weight holds nan"),
        prepare=lambda folder: spoil_weights(folder / "model", "model.norm.weight"),
    ),
    Case(
        "packing in a family whose rows then see each other",
        f"{SFT} model.path=model trainer.packing=true",
        ("trainer.packing=true", "FalconForCausalLM (falcon)", "set trainer.packing=false"),
        prepare=lambda folder: write_model(folder / "model", "falcon_7b"),
    ),
    Case(
        "packing in a way that mixes rows",
        f"{SFT} model.path=model trainer.packing=true trainer.packing_strategy=wrapped",
        ("trainer.packing=true", "trainer.packing_strategy=bfd"),
    ),
    Case(
        "a family that the sampler's cache does not serve",
        f"{SFT} model.tokenizer=model "
        "model.config={model_type:mamba,hidden_size:32,num_hidden_layers:2}",
        ("num_samples=32", "MambaForCausalLM (mamba)", "set num_samples=0"),
    ),
    Case(
        "adapters on layers that the model lacks",
        f"{SFT} dataset.path=rows.jsonl model.path=model peft=lora peft.target_modules=[c_attn]",
        ("peft.target_modules=['c_attn']", "q_proj, k_proj, v_proj"),
    ),
    Case(
        "adapters of the reward model on layers that it lacks",
        f"{REWARD} run_name=new dataset.path=ranked.jsonl peft=lora "
        "model.path=runs/mine/sft/final peft.target_modules=[c_attn]",
        ("peft.target_modules=['c_attn']", "LlamaForSequenceClassification", "q_proj, k_proj"),
    ),
    Case(
        "adapters of PPO on layers that its policy lacks",
        f"{PPO} {MINE} dataset.path=prompts.jsonl peft=lora peft.target_modules=[c_attn]",
        ("peft.target_modules=['c_attn']", "LlamaForCausalLM", "q_proj, k_proj"),
    ),
    Case(
        "a learning rate at which training diverges",
        f"{SFT} model.path=model trainer.learning_rate=1e30 trainer.warmup_steps=0",
        ("the loss is nan in step 2", "overwrite=true and trainer.learning_rate=0.001"),
    ),
    Case(
        "a run's folder instead of its final/",
        f"{REWARD} run_name=new model.path=runs/mine",
        ("model.path=runs/mine", "did you mean", "runs/mine/sft/final"),
    ),
    Case(
        "the directory of another stage",
        f"{REWARD} run_name=new model.path=runs/mine/reward/final",
        ("written by the reward stage", "sft"),
    ),
    Case(
        "no earlier stage",
        f"{PPO} scorer.path=runs/mine/reward/final",
        ("model.path", "python -m rlhf.sft run_name=new"),
    ),
    Case(
        "a policy as reward model",
        f"{PPO} model.path=runs/mine/sft/final scorer.path=runs/mine/sft/final",
        ("scorer.path=runs/mine/sft/final", "reward"),
    ),
    Case(
        "a damaged rlhf.json",
        f"{PPO} {MINE}",
        ("rlhf.json", "damaged"),
        prepare=lambda folder: (folder / "runs/mine/reward/final/rlhf.json").write_text("{"),
    ),
    Case(
        "reward model and policy of other tokenizers",
        f"{PPO} {MINE}",
        ("tokenizer mismatch", "runs/mine/reward/final"),
        prepare=lambda folder: edit_json(
            folder / "runs/mine/reward/final/rlhf.json", tokenizer="0" * 64
        ),
    ),
    Case(
        "a response budget beyond the context",
        f"{PPO} {MINE} ppo.response_length=128",
        ("ppo.response_length=128", "127"),
    ),
    Case(
        "a Python scorer that does not exist",
        f"{PPO} {OWN_SCORER} scorer.path=os.no",
        ("scorer.path", "os.no", "cannot be imported"),
    ),
    Case(
        "an adapter whose base is gone",
        f"{SFT} model.path=adapter",
        ("model.path=adapter is an adapter", "base_model_name_or_path=./gone", "no such directory"),
        prepare=lambda folder: put_adapter(folder, base="./gone"),
    ),
    Case(
        "a pickled adapter",
        f"{SFT} model.path=adapter model.tokenizer=model",
        ("model.path=adapter has pickled weights (adapter_model.bin)", "safetensors"),
        prepare=lambda folder: put_adapter(folder, weights="adapter_model.bin"),
    ),
    Case(
        "an adapter of another model",
        f"{SFT} model.path=adapter model.tokenizer=model",
        ("the adapter in adapter does not fit", "base_model.model.other.lora_A.weight"),
        prepare=lambda folder: put_adapter(folder),
    ),
    Case(
        "weights cut short",
        f"{SFT} model.path=model",
        ("model/model.safetensors is damaged or incomplete",),
        prepare=lambda folder: os.truncate(folder / "model/model.safetensors", 3000),
    ),
    Case(
        "a config.json that is not UTF-8",
        f"{SFT} model.path=model",
        ("model/config.json is damaged (not UTF-8",),
        prepare=lambda folder: (folder / "model/config.json").write_bytes(b'{"a": "\xff"}'),
    ),
    Case(
        "a damaged tokenizer.json",
        f"{SFT} model.path=model",
        ("model/tokenizer.json is damaged",),
        prepare=lambda folder: (folder / "model/tokenizer.json").write_bytes(b"{"),
    ),
    Case(
        "a language model as reward model",
        f"{PPO} model.path=runs/mine/sft/final scorer.path=model scorer.normalize=none",
        ("scorer.path=model: there are no weights for score.weight", "scorer.path=my_scorer.score"),
    ),
    Case(
        "a file instead of a directory",
        f"{SFT} model.path=model/model.safetensors model.tokenizer=model",
        ("model.path=model/model.safetensors is a file", "model"),
    ),
]


def put_adapter(
    folder: Path, base: str = "model", weights: str = "adapter_model.safetensors"
) -> None:
    """Write adapter/, whose only weight belongs to no model."""
    (folder / "adapter").mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    settings |= {"base_model_name_or_path": base}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(settings))
    tensors = {"base_model.model.other.lora_A.weight": torch.zeros(2, 2)}
    save_file(tensors, folder / "adapter" / weights)
