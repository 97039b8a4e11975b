"""Settings"""

from bad_input import Case

SFT = "rlhf.sft model.path=model dataset=prompt_completion dataset.path=rows.jsonl run_name=new"
PPO = "rlhf.ppo dataset=prompt_completion dataset.path=prompts.jsonl run_name=mine"

CASES = [
    Case(
        "a typo in the settings of a new model",
        "rlhf.sft model.tokenizer=model model.config.model_type=llama model.config.hiden_size=64 "
        "dataset=prompt_completion dataset.path=rows.jsonl run_name=new",
        ("model.config.hiden_size", "hidden_size"),
    ),
    Case(
        "a model type that does not exist",
        "rlhf.sft model.tokenizer=model model.config.model_type=lama "
        "dataset=prompt_completion dataset.path=rows.jsonl run_name=new",
        ("model.config.model_type=lama", "llama"),
    ),
    Case(
        "a model to load and one to build",
        f"{SFT} recipe=demo",
        ("model.path=model", "model.config={", "model.path=null", "~model.config.model_type"),
    ),
    Case("a typo in a key", f"{PPO} ppo.kl_coeff=0.1", ("ppo.kl_coeff", "Use ppo.kl_coef")),
    Case(
        "no data, but an argument that asks for something else than the demo",
        "rlhf.sft seed=2",
        ("dataset.path", "model.path", "recipe=demo"),
    ),
    Case("a value of another type", f"{PPO} ppo.kl_coef=much", ("ppo.kl_coef", "much")),
    Case("a negative coefficient", f"{PPO} ppo.kl_coef=-0.1", ("ppo.kl_coef must be >= 0", "-0.1")),
    Case("a probability above 1", f"{PPO} ppo.gamma=1.5", ("ppo.gamma", "[0, 1]", "1.5")),
    Case(
        "an unknown choice", f"{PPO} ppo.kl_estimator=k4", ("ppo.kl_estimator", "k1, k2, k3", "k4")
    ),
    Case("no update at all", f"{PPO} ppo.num_updates=0", ("ppo.num_updates must be >= 1", "0")),
    Case(
        "several values out of range are named at once",
        f"{PPO} ppo.lam=2 ppo.cliprange=0 critic.init=random",
        ("ppo.lam", "ppo.cliprange", "critic.init"),
    ),
    Case("a temperature of 0", f"{SFT} temperature=0", ("temperature must be > 0",)),
    Case("a run name with a slash", f"{SFT} run_name=a/b", ("run_name", "a/b")),
    Case("an unknown trainer argument", f"{SFT} trainer.learning_rat=1", ("learning_rate",)),
    Case(
        "a trainer argument that the stage sets itself",
        f"{SFT} trainer.output_dir=here",
        ("trainer.output_dir", "remove it"),
    ),
    Case(
        "a tracker among the trainer's arguments",
        f"{SFT} trainer.report_to=wandb",
        ("trainer.report_to", "set tracker=wandb"),
    ),
    Case(
        "checkpoints among the trainer's arguments",
        f"{SFT} trainer.save_steps=10",
        ("trainer.save_steps", "checkpoint.every"),
    ),
    Case(
        "the longest row among the trainer's arguments",
        f"{SFT} trainer.max_length=64",
        ("trainer.max_length", "set dataset.max_length"),
    ),
    Case(
        "DeepSpeed among the trainer's arguments",
        f"{SFT} trainer.deepspeed=zero.json",
        ("trainer.deepspeed", "accelerate config"),
    ),
    Case("an unknown optimiser", f"{SFT} trainer.optim=adam", ("adam is not", "adamw_torch")),
    Case(
        "an optimiser that is not installed",
        f"{SFT} trainer.optim=galore_adamw",
        ("trainer.optim=galore_adamw", "galore_torch", "trainer.optim=adamw_torch"),
    ),
    Case(
        "a schedule without what it needs",
        f"{SFT} trainer.lr_scheduler_type=warmup_stable_decay",
        ("trainer.lr_scheduler_type=warmup_stable_decay", "trainer.lr_scheduler_kwargs"),
    ),
    Case(
        "no row in a batch",
        f"{SFT} trainer.per_device_train_batch_size=0",
        ("trainer.per_device_train_batch_size must be >= 1, got 0",),
    ),
    Case(
        "no step between two evaluations",
        f"{SFT} trainer.eval_steps=0",
        ("trainer.eval_steps must be > 0, got 0",),
    ),
    Case(
        "a trainer argument of another type",
        f"{SFT} trainer.learning_rate=fast",
        ("trainer.learning_rate must be a number, got 'fast'",),
    ),
    Case(
        "an infinite learning rate",
        f"{SFT} trainer.learning_rate=inf",
        ("trainer.learning_rate must be a finite number, got inf",),
    ),
    Case("nan for a coefficient", f"{PPO} ppo.vf_coef=nan", ("ppo.vf_coef", "finite", "nan")),
    Case(
        "label smoothing of the Trainer in the reward stage",
        "rlhf.reward run_name=new model.path=runs/mine/sft/final dataset=ranked "
        "dataset.path=ranked.jsonl trainer.label_smoothing_factor=0.1",
        ("trainer.label_smoothing_factor", "reward.label_smoothing"),
    ),
    Case(
        "an unknown attention implementation",
        f"{SFT} model.attn_implementation=flash",
        ("model.attn_implementation", "flash_attention_2", "'flash'"),
    ),
    Case(
        "a revision of a directory",
        f"{SFT} model.revision=main",
        ("model.revision=main", "model.path=model", "model.revision=null"),
    ),
    Case(
        "chat at an infinite temperature",
        "rlhf.chat path=model temperature=inf",
        ("temperature must be a finite number, got inf",),
    ),
    Case(
        "batch_size and accumulation",
        f"{SFT} batch_size=8 trainer.gradient_accumulation_steps=2",
        ("batch_size=8", "trainer.gradient_accumulation_steps"),
    ),
    Case("an override without =", f"{SFT} ppo", ("ppo",)),
    Case("a recipe that does not exist", "rlhf.sft recipe=alpacca", ("recipe=alpacca", "alpaca")),
    Case("a recipe without this stage", "rlhf.ppo recipe=alpaca", ("recipe=alpaca", "sft")),
    Case(
        "quantised weights without adapters",
        f"{SFT} model.quantization=4bit",
        ("model.quantization=4bit", "peft=lora"),
    ),
    Case(
        "demonstrations without their rows",
        "rlhf.reward run_name=mine overwrite=true dataset=ranked dataset.path=ranked.jsonl "
        "normalization.completions=demonstrations",
        ("normalization.path", "normalization.path=train.jsonl"),
    ),
    Case(
        "fewer tokens for a pass than the longest row has",
        f"{PPO} ppo.response_length=24 ppo.micro_batch_tokens=28",
        ("ppo.micro_batch_tokens=28 is less than the longest row", "set it to "),
    ),
    Case(
        "fewer tokens for a pass than a response has",
        f"{PPO} ppo.response_length=24 ppo.micro_batch_tokens=20",
        ("ppo.micro_batch_tokens=20 is less than a row", "set it to 25 or more"),
    ),
    Case(
        "a shared trunk and another model as the critic",
        f"{PPO} critic.share_trunk=true critic.init=reward",
        ("critic.share_trunk=true", "critic.init=reward", "critic.init=null"),
    ),
    Case(
        "an unknown sampling engine",
        f"{PPO} sampling.engine=fast",
        ("sampling.engine", "auto, loop, graph, vllm", "fast"),
    ),
    Case(
        "vLLM without a server",
        f"{PPO} sampling.engine=vllm",
        ("sampling.url=http://127.0.0.1:8000", "sampling.vllm_python=<python"),
    ),
    Case(
        "a vLLM server that does not run",
        f"{PPO} sampling.engine=vllm sampling.url=http://127.0.0.1:9",
        ("sampling.url=http://127.0.0.1:9 cannot be reached (Connection refused)",),
    ),
    Case(
        "a vLLM server for another engine",
        f"{PPO} sampling.engine=loop sampling.url=http://127.0.0.1:8000",
        ("sampling.engine=loop; set sampling.engine=vllm, or leave sampling.url out",),
    ),
    Case(
        "restricted sampling in PPO",
        f"{PPO} ppo.top_p=0.9",
        ("ppo.top_p", "ppo.allow_off_policy_sampling"),
    ),
]
