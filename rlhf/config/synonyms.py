"""What other frameworks (TRL, LLaMA-Factory, axolotl, OpenRLHF, verl) call our settings."""

from __future__ import annotations

from collections.abc import Collection

from rlhf.config.errors import nearest

# Our key of each stage -> their names. Names of ours that differ by their group are found too.
_NAMES = {
    "trainer.learning_rate ppo.learning_rate": "lr learning_rate actor_lr actor_learning_rate",
    "critic.learning_rate": "critic_lr critic_learning_rate",
    "trainer.num_train_epochs ppo.num_updates": """epochs num_epochs num_train_epochs max_epochs
        total_epochs""",
    "trainer.max_steps ppo.num_updates": """steps max_steps num_steps total_steps total_episodes
        num_updates""",
    "ppo.num_ppo_epochs": "ppo_epochs num_ppo_epochs update_epochs num_iterations",
    "batch_size ppo.batch_size": """batch_size bs train_batch_size rollout_batch_size
        per_device_batch_size""",
    "trainer.per_device_train_batch_size ppo.micro_batch_size": """micro_batch_size mini_batch_size
        per_device_train_batch_size micro_train_batch_size gradient_accumulation_steps""",
    "ppo.kl_coef": "kl beta kl_coeff kl_beta init_kl_coef kl_penalty kl_ctl kl_loss_coef kl_weight",
    "ppo.cliprange": "clip clip_range epsilon clip_ratio eps_clip cliprange",
    "ppo.lam": "lambda lambd gae_lambda",
    "ppo.advantage": "advantage_estimator adv_estimator estimator",
    "ppo.samples_per_prompt": "num_generations n_samples_per_prompt rollout_n group_size",
    "response_length ppo.response_length": """max_new_tokens max_tokens max_completion_length
        generate_max_len max_response_length response_len""",
    "temperature ppo.temperature": "temp sampling_temperature",
    "dataset.max_length": "max_length max_seq_length max_seq_len cutoff_len sequence_len max_len",
    "dataset.max_rows": "max_samples max_train_samples",
    "dataset.path": """data dataset_path data_path train_file train_data train_files dataset_name
        prompt_data prompts""",
    "dataset.eval_path": "eval_data eval_file val_file val_files test_file validation_file",
    "dataset.eval_fraction": "val_size eval_size test_size val_set_size",
    "model.path": "model_name_or_path model_name model_path base_model pretrain checkpoint",
    "model.chat_template": "template chat_template",
    "model.dtype precision": "dtype torch_dtype bf16 fp16 mixed_precision",
    "model.quantization": "load_in_4bit load_in_8bit quantization_bit quantization",
    "model.gradient_checkpointing": "gradient_checkpointing",
    "model.attn_implementation": "flash_attn attn_implementation flash_attention",
    "model.trust_remote_code": "trust_remote_code",
    "peft.r": "lora_r lora_rank rank",
    "peft.alpha": "lora_alpha",
    "peft.dropout": "lora_dropout",
    "peft.save": "save save_adapter save_merged merge_lora merge_and_unload merge_weights",
    "peft.target_modules": "lora_target lora_target_modules target_modules",
    "peft": "use_peft use_lora lora adapter finetuning_type",
    "scorer.path": """reward_model reward_model_path reward_funcs reward_fn reward_function
        reward_pretrain rm""",
    "run_name runs_dir": "output_dir output save_dir out_dir out name experiment_name",
    "checkpoint.every": "save_steps save_interval save_freq",
    "trainer.eval_steps evaluation.every": "eval_steps eval_interval test_freq",
    "resume": "resume_from_checkpoint",
    "overwrite": "overwrite_output_dir",
    "tracker": "report_to logger wandb use_wandb",
    "trainer.warmup_steps ppo.lr_warmup_updates": "warmup warmup_ratio warmup_steps",
    "trainer.lr_scheduler_type": "lr_scheduler lr_schedule scheduler lr_scheduler_type",
    "trainer.weight_decay": "weight_decay wd",
    "trainer.packing": "packing",
}
SYNONYMS = {name: keys.split() for keys, names in _NAMES.items() for name in names.split()}


def suggest(key: str, known: Collection[str]) -> str:
    """Return ` Use <our key>.` for a key of another framework, else the nearest keys."""
    name = key.rpartition(".")[2].lower().replace("-", "_")
    free = [group for group in ("trainer",) if group in known]
    keys = [
        ours
        for ours in SYNONYMS.get(name, [])
        if ours != key and (ours in known or ours.partition(".")[0] in free)
    ]
    keys = [ours for ours in keys if ours.rpartition(".")[2] == name] or keys
    return f" Use {' or '.join(keys)}." if keys else nearest(key, known)
