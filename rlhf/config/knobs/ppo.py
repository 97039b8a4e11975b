"""Knobs of PPO: the algorithm, sampling, critic, pretraining text, evaluation and warnings."""

from __future__ import annotations

from rlhf.config.fields import group, knob, knobs
from rlhf.config.knobs.scorer import ScorerConfig
from rlhf.config.knobs.shared import StageConfig
from rlhf.config.objects import has_weights


@knobs
class PPOConfig:
    """The algorithm; names are those of TRL's last PPOConfig where one existed."""

    num_updates: int = knob(200, ge=1)
    """Number of updates: a rollout, then num_ppo_epochs x num_mini_batches optimiser steps."""
    batch_size: int = knob(64, ge=1)
    """Responses per rollout over all processes."""
    samples_per_prompt: int = knob(1, ge=1)
    """Responses per prompt; must divide batch_size."""
    num_ppo_epochs: int = knob(4, ge=1)
    """Passes over each rollout."""
    num_mini_batches: int = knob(1, ge=1)
    """Optimiser steps per pass; must divide batch_size."""
    micro_batch_size: int | None = knob(None, ge=1)
    """Sequences per training forward pass and process; changes memory and speed, not the result
    (null: as many as micro_batch_tokens take, or as have the tokens of the 8 longest)."""
    micro_batch_tokens: int | str | None = None
    """Tokens per training forward pass and process, with prompts: fewer sequences where they are
    long; auto: as many as memory has room for, measured by the preflight (null: auto on a GPU if
    micro_batch_size is null, else no limit)."""
    chunk_tokens: int = knob(1024, ge=1)
    """Response tokens per process whose logits exist at once; of more in a micro-batch, they are
    computed again in the backward pass. Changes memory and speed, not the result."""
    rollout_batch_size: int = knob(64, ge=1)
    """Sequences that are decoded together, per process."""
    max_prompt_length: int | None = knob(None, ge=1)
    """Longest prompt, tokens; others are dropped and counted (null: context - response_length)."""
    response_length: int = knob(128, ge=1)
    """Longest response, tokens, EOS included."""
    temperature: float = knob(1.0, gt=0)
    """Divides the logits, in sampling and in every log-prob."""
    top_p: float = knob(1.0, gt=0, le=1)
    """Sample from the most probable tokens that together reach this probability (1.0: from all)."""
    top_k: int = knob(0, ge=0)
    """Sample from this many most probable tokens (0: from all)."""
    allow_off_policy_sampling: bool = False
    """Permit top_p and top_k: they sample from a different distribution than the one PPO scores."""
    missing_eos_penalty: float | int | str | None = "auto"
    """Score without EOS, after normalisation (null: the scorer's own; auto: -1 with a reward model,
    null where only Python functions score); token rewards are kept."""
    mask_truncated: bool = False
    """Leave responses without EOS out of losses and whitening; a minibatch of these has no step."""
    scale_scores: bool = False
    """Divide scores by their running standard deviation."""
    whiten_scores: bool = False
    """Give the scores of a rollout mean 0 and variance 1 (Llama 2), before missing_eos_penalty."""
    clip_scores: float | None = knob(None, gt=0)
    """Then clip scores to +- this value, score units (null: off)."""
    reference: str | None = None
    """Hub id or directory of the KL reference, with the policy's tokenizer (null: the policy that
    training starts from)."""
    share_base: bool = False
    """Hold one frozen base in memory: policy, critic and reward models are LoRA adapters on it, and
    the reference is the base alone. Needs peft=lora, here and in the reward stage."""
    base: str = knob("merged", choices=("merged", "stacked"))
    """With share_base, after SFT with LoRA: merge its adapter into the base, or keep it on the base
    that SFT started from, frozen, below the policy's."""
    kl_coef: float = knob(0.05, ge=0)
    """Weight of the KL penalty, score units per nat."""
    kl_estimator: str = knob("k1", choices=("k1", "k2", "k3"))
    """Estimator of the KL penalty per token."""
    kl_in: str = knob("reward", choices=("reward", "loss"))
    """Where the KL penalty is: in the reward (InstructGPT) or in the loss (GRPO, with k3)."""
    kl_target: float | None = knob(None, gt=0)
    """Adapt kl_coef to keep the KL at this value, nats per sequence (null: fixed kl_coef)."""
    kl_horizon: int = knob(10000, ge=1)
    """Episodes over which kl_coef adapts; larger adapts slower."""
    importance_correction: str | None = knob(None, choices=("truncated",))
    """truncated: weigh each token by p(policy) / p(sampler), at most importance_cap, where the
    sampler rounds otherwise (sampling.dtype); it does not make up for top_p and top_k (null:
    off)."""
    importance_cap: float = knob(3.0, ge=1)
    """Largest weight of importance_correction."""
    whiten_rewards: bool = False
    """Scale rewards to unit variance and keep their mean."""
    advantage: str = knob("gae", choices=("gae", "rloo", "grpo", "reinforce_pp"))
    """Estimator: gae (with a critic), rloo or grpo (samples_per_prompt >= 2), or reinforce_pp."""
    gamma: float = knob(1.0, ge=0, le=1)
    """Discount per token."""
    lam: float = knob(0.95, ge=0, le=1)
    """Lambda of GAE."""
    whiten_advantages: bool | None = None
    """Whiten advantages over the rollout's tokens (null: as published, gae and reinforce_pp do)."""
    cliprange: float = knob(0.2, gt=0)
    """Clip range of the probability ratio."""
    dual_clip: float | None = knob(None, gt=1)
    """Upper bound on the ratio where the advantage is negative (null: off)."""
    cliprange_value: float | None = knob(0.2, gt=0)
    """Clip range of the value change, score units (null: off)."""
    vf_coef: float = knob(0.1, ge=0)
    """Factor of the value loss."""
    entropy_coef: float = knob(0.0, ge=0)
    """Bonus per nat of entropy."""
    target_kl: float | None = knob(None, gt=0)
    """End an update once the mean KL(old || new) is above this, nats per token (null: off)."""
    learning_rate: float | None = knob(None, ge=0)
    """Peak learning rate of the policy (null: 3e-6, with LoRA adapters 3e-4)."""
    lr_schedule: str = knob("linear", choices=("linear", "constant"))
    """linear: to zero over the updates after the warm-up; constant; for policy and critic."""
    lr_warmup_updates: int = knob(0, ge=0)
    """Number of warm-up updates."""
    lr_warmup_start: float = knob(0.0, ge=0, le=1)
    """Share of the learning rate in the first warm-up update (0: 1 / (lr_warmup_updates + 1))."""
    adam_betas: list[float] = knob([0.9, 0.999])
    """Two betas of AdamW, for policy and critic, each in [0, 1) (InstructGPT: [0.9, 0.95])."""
    adam_epsilon: float = knob(1e-5, gt=0)
    """Epsilon of AdamW, for policy and critic."""
    fused_adam: bool | None = None
    """Update all weights of a model in one kernel; numbers change by rounding (null: on a GPU, and
    on a CPU for models that train at least a million weights)."""
    weight_decay: float = knob(0.0, ge=0)
    """Weight decay of matrices; biases and norms have none."""
    max_grad_norm: float = knob(1.0, gt=0)
    """Clip the gradient norms of policy and critic to this value, each by itself."""
    ema_decay: float | None = knob(None, gt=0, lt=1)
    """Decay per optimiser step of averaged policy weights, which are evaluated and saved in place
    of the last ones (InstructGPT: 0.992; null: off)."""
    save_rollouts: int | None = knob(None, ge=1)
    """Write every N-th rollout with its KL, rewards and advantages to rollouts/ (null: none)."""

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def first_epoch_reads(self) -> bool:
        """True if the first epoch's own forward pass gives the old log-probs: no reward has a KL in
        it, and the policy does not move before all responses are read."""
        in_rewards = self.kl_in == "reward" and self.kl_coef > 0
        return not (in_rewards or self.num_mini_batches > 1 or self.mask_truncated)

    def rows_of(self, length: int, longest: int | None = None) -> int:
        """Number of sequences of this many tokens that a training forward pass takes, where the
        longest of all has `longest` (None: `length`)."""
        most, tokens = self.micro_batch_size, self.micro_batch_tokens
        if not isinstance(tokens, int):
            return most or 8 * (longest or length) // length
        fitting = max(1, tokens // length)
        return min(fitting, most or fitting)


@knobs
class SamplingConfig:
    """How fast responses are sampled; which they are stays the same, up to rounding."""

    engine: str = knob("auto", choices=("auto", "loop", "graph", "vllm"))
    """loop: a forward pass per token; graph: steps on a cache of fixed size, which a GPU replays as
    CUDA graphs; vllm: a vLLM server (url or vllm_python), which draws other tokens of the same
    distribution; auto: graph on a GPU, if it samples what the policy predicts (measured), else
    loop."""
    check_every: int = knob(8, ge=1)
    """Tokens between two looks for finished responses; graph only."""
    dtype: str | None = knob(None, choices=("float32", "bfloat16"))
    """Type of a copy of the policy that samples in its place, adapters merged (null: bfloat16 on a
    GPU where a float32 policy trains with precision=bfloat16, else no copy)."""
    gather: str = knob("auto", choices=("auto", "copy", "layers"))
    """Of a policy in slices, copy gathers a whole one before each rollout; layers gathers one layer
    after the other for each token, in the same type: less memory, far more time. auto: copy, if it
    fits."""
    url: str | None = None
    """vLLM server that was started in developer mode (VLLM_SERVER_DEV_MODE=1) with --logprobs-mode
    processed_logprobs, e.g. http://127.0.0.1:8000."""
    vllm_python: str | None = None
    """In place of url: python of an environment with vLLM; the run starts a server with it."""
    vllm_args: list[str] = knob([])
    """Further arguments of that server, e.g. [--gpu-memory-utilization,"0.3"]."""
    weights: str = knob("auto", choices=("auto", "files", "adapter", "nccl"))
    """How the weights reach that server before each rollout. files: the whole model in a folder,
    adapters merged; adapter: the LoRA adapter alone, after its base once; nccl: from GPU to GPU by
    TRL's client; auto: adapter if only LoRA adapters train and the server takes them, else
    files."""
    weights_dir: str | None = None
    """Folder through which the weights reach the server, under the same path on both sides (null: a
    temporary one of this machine)."""
    max_gap: float | None = knob(1.0, gt=0)
    """Stop the run, which can be resumed, if log-probs of sampler and policy differ by more than
    this at one token in a thousand of an update, nats (null: off)."""


@knobs
class PtxConfig:
    """PPO-ptx: the loss on this text is added at every optimiser step."""

    coef: float = knob(0.0, ge=0)
    """Factor of the mean loss per token (0: off; InstructGPT: 27.8)."""
    path: str | None = None
    """Rows with the field `text`, or SFT rows with their format; read like dataset.path."""
    split: str = "train"
    """Split of a Hub name."""
    format: str | None = None
    """Format of the rows, as in dataset.format."""
    batch_size: int = knob(64, ge=1)
    """Texts per optimiser step over all processes."""
    max_length: int = knob(512, ge=2)
    """Length at which a text is cut, tokens."""


@knobs
class CriticConfig:
    """The value model."""

    init: str | None = None
    """reward: start from the reward model (the first of scorer.components); policy: from the policy
    with a new head; or a trained critic: runs/<run_name>/ppo/critic, which every run writes (null:
    reward, or policy where the scorer is no reward model)."""
    learning_rate: float | None = knob(None, ge=0)
    """Peak learning rate of the critic (null: 3e-6, with LoRA adapters 3e-4)."""
    share_trunk: bool = False
    """Put a new value head on the policy's own trunk: one forward and backward pass in place of
    two, and no critic/. Another algorithm: the value loss also moves the policy."""
    trunk_coef: float = knob(1.0, ge=0)
    """With share_trunk: factor of the value loss's gradient into the trunk, after ppo.vf_coef (0:
    the head alone learns values)."""
    warmup_updates: int = knob(0, ge=0)
    """Number of first updates that train only the critic."""
    must_explain: bool | None = None
    """Estimate the advantages of an update without the critic, as returns minus their mean, while
    its explained variance on the new rollout is not above 0 (null: true where the critic starts
    with a new head, critic.init=policy)."""


@knobs
class EvaluationConfig:
    """Held-out evaluation during and after PPO, and which update becomes final/."""

    every: int = knob(20, ge=1)
    """Updates between two evaluations on held-out prompts."""
    num_prompts: int = knob(64, ge=0)
    """Held-out prompts (0: no evaluation and no held-out prompts; final/ is the last update)."""
    scorer: str | None = None
    """A scorer PPO does not train on: module.function or a reward model (raw scores)."""
    select: str = knob("score_minus_kl", choices=("score_minus_kl", "independent_score", "last"))
    """Which update becomes final/: score_minus_kl (score - select_kl_coef x KL), independent_score
    (of evaluation.scorer), or last."""
    select_kl_coef: float | None = knob(None, ge=0)
    """Weight of the KL in score_minus_kl, score units per nat (null: ppo.kl_coef)."""


@knobs
class WatchdogConfig:
    """Thresholds of the warnings in watchdog.jsonl (null: off); each warning names its remedy."""

    first_ratio: float | None = knob(1e-3, gt=0)
    """Warn if |ratio - 1| in the first minibatch of an update, which should be 0, is above this."""
    ratio: float | None = knob(100.0, gt=1)
    """Warn if the largest ratio of an update, or the inverse of the smallest, is above this."""
    clip_fraction: float | None = knob(0.3, ge=0, le=1)
    """Warn if the share of clipped tokens is above this."""
    negative_kl: float | None = knob(4.0, gt=0)
    """Warn if the KL is more than this many standard errors below 0 (of few responses, than what is
    as rare for their number)."""
    kl_budget: float | None = knob(None, gt=0)
    """End the run if the KL is above this, nats per sequence."""
    entropy_drop: float | None = knob(0.2, ge=0, le=1)
    """Warn if the entropy is below this share of the first update's."""
    explained_variance: float | None = knob(-0.5, lt=1)
    """Warn if the critic's explained variance is below this after its warm-up."""
    eos_rate: float | None = knob(0.5, ge=0, le=1)
    """Warn if the share of responses that end with a stop token is below this."""
    length_drift: float | None = knob(2.0, gt=1)
    """Warn if the mean response length differs from the first update's by more than this factor."""
    score_std: float | None = knob(1e-4, gt=0)
    """Warn if the standard deviation of a rollout's scores is below this, score units."""
    grad_norm: float | None = knob(100.0, gt=0)
    """Warn if the gradient norm of policy or critic before clipping is above this."""
    sampler_gap: float | None = knob(0.5, gt=0)
    """Warn if log-probs of sampling and training differ by more than this, nats per token."""


@knobs
class PPOStageConfig(StageConfig):
    """PPO against the reward model, from this run's SFT and reward stages (python -m rlhf.ppo)."""

    preflight: bool | str = knob(True, choices=(True, False, "only"))
    """Examine memory, ratio, tokenizer, scorer and best-of-n before training; only: then exit."""
    offload_frozen: bool = False
    """Keep the reference and the reward models in main memory, except while they are read; a GPU
    then holds only what trains. No effect on a CPU."""
    compile: bool = False
    """Compile the decoder blocks (torch.compile) for training and scoring passes: minutes at the
    start, faster passes; numbers change by rounding. Needs a C++ compiler."""
    ppo: PPOConfig = group(PPOConfig)
    sampling: SamplingConfig = group(SamplingConfig)
    ptx: PtxConfig = group(PtxConfig)
    scorer: ScorerConfig = group(ScorerConfig)
    critic: CriticConfig = group(CriticConfig)
    evaluation: EvaluationConfig = group(EvaluationConfig)
    watchdog: WatchdogConfig = group(WatchdogConfig)

    @property
    def checkpoint_every(self) -> int:
        return self.checkpoint.every or 20

    @property
    def needs_eval(self) -> bool:
        return self.evaluation.num_prompts > 0

    @property
    def critic_must_explain(self) -> bool:
        """`critic.must_explain`, with a value for null."""
        given = self.critic.must_explain
        return self.ppo.has_critic and (self.critic.init == "policy" if given is None else given)

    @property
    def eos_penalty(self) -> float | None:
        """`ppo.missing_eos_penalty`, with a value for auto."""
        penalty = self.ppo.missing_eos_penalty
        if penalty == "auto":
            paths = [part.path for part in self.scorer.components] or [self.scorer.path]
            penalty = -1.0 if any(map(has_weights, paths)) else None
        return None if penalty is None else float(penalty)
