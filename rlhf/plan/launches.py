"""Memory of one GPU of several, under each file of `conf/accelerate/`.

ddp            each GPU holds all of it; buckets hold the gradients a second time
zero2          gradients and Adam's states in slices (Rajbhandari et al. 2020)
zero3          weights in slices too; DeepSpeed keeps what it gathers up to a limit
zero3_offload  as zero3, but the slices are in main memory
fsdp2          weights in slices too; blocks are whole, in float32, while they are used
fsdp2_offload  as fsdp2, but the slices are in main memory

With one base for all roles, FSDP2 slices the base; adapters stay whole on each GPU. PPO samples
from a whole copy of a policy in slices, or gathers layers for each token, both in bfloat16; it
writes checkpoints from a copy in main memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config import ScorerConfig
from rlhf.models import ModelMemory
from rlhf.plan.counting import FLOAT, HALF, Measured
from rlhf.ppo.preflight.memory import FULL, MemoryEstimate

LAUNCHES = ("ddp", "zero2", "zero3", "zero3_offload", "fsdp2", "fsdp2_offload")
OFFLOADED = ("fsdp2_offload", "zero3_offload")
SLICED = ("fsdp2", "zero3", *OFFLOADED)  # weights too
# DeepSpeed's defaults, float32 numbers: its bucket of gradients, and the gathered weights it keeps.
BUCKET, LIVE = 500_000_000, 1_000_000_000


@dataclass
class Setting:
    """What the memory of a stage depends on, next to the model."""

    stage: str
    gpus: int
    prompt_length: int  # tokens
    response_length: int
    lora: bool = False
    dtype: str = "float32"  # of the stored weights of what trains
    quantization: str | None = None  # of the linear layers below LoRA
    checkpointing: bool = False
    critic: bool = True
    offload_frozen: bool = False
    share_base: bool = False  # one base in memory, with LoRA adapters for each role
    stacked: bool = False  # the adapter of SFT apart from that base
    sampled_rows: int = 64  # of the rollout, on one GPU
    gather: str = "auto"  # sampling.gather; `estimate` takes auto for copy

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt_length + self.response_length


def launches(setting: Setting) -> tuple[str, ...]:
    """The files that the stage takes; those that shard need several GPUs, and take no packed
    weights. DeepSpeed's take float32."""
    if setting.gpus == 1 or setting.quantization is not None:
        return LAUNCHES[:1]
    return tuple(x for x in LAUNCHES if setting.dtype == "float32" or not x.startswith("zero"))


def estimate(model: Measured, setting: Setting, launch: str, rows: int = 1) -> MemoryEstimate:
    """Estimate the memory of one GPU, with passes over `rows` rows at a time."""
    train = _trained(model, setting, launch)
    read = (
        setting.response_length if setting.stage == "ppo" else setting.length
    )  # tokens with logits
    kept = model.kept(rows, setting.checkpointing) + train.activations
    policy = ModelMemory(train.weights, train.gradients, train.adam, kept)
    if setting.stage != "reward":
        policy.activations += model.logits(rows * read)
    if setting.stage != "ppo":
        return MemoryEstimate({"model": policy}, 0)
    models = {"policy": policy}
    adapters = FLOAT * model.trained
    if setting.stacked:  # of the same rank
        models["adapter of SFT"] = ModelMemory(adapters)
    if setting.critic:
        weights = adapters if setting.share_base else train.weights
        models["critic"] = ModelMemory(weights, train.gradients, train.adam, kept)
    frozen = ModelMemory(adapters if setting.share_base else _merged(model, setting))
    if not setting.offload_frozen:
        models["reward model"] = frozen
    if not (setting.offload_frozen or setting.lora):  # with LoRA: the policy with its adapters off
        models["reference"] = _reference(model, setting, launch)
    cache = setting.sampled_rows * setting.length * model.cache_per_token
    read = model.passing * setting.prompt_length // setting.length
    prompts = setting.sampled_rows * (setting.prompt_length * model.cache_per_token + read)
    if launch in SLICED and setting.gather == "layers":
        prompts = max(prompts, cache)  # engine loop drops its cache after the rollout
        if setting.dtype == "float32":
            models["sampler"] = ModelMemory(_in_slices(model, setting, launch))
    else:
        copies = setting.dtype == "float32" or launch in SLICED
        models["sampler"] = ModelMemory(_merged(model, setting) * copies + cache)
    scored = min(setting.sampled_rows, ScorerConfig().batch_size) * model.passing
    visiting = frozen.weights if setting.offload_frozen else 0
    return MemoryEstimate(models, prompts, scored, visiting)


def chosen_gather(model: Measured, setting: Setting, launch: str, memory: int) -> str:
    """How PPO samples from a policy in slices, as `sampling.gather` chooses: "copy" or "layers";
    "itself" where no policy is in slices.

    Args:
        memory: bytes of a GPU.
    """
    if launch not in SLICED or setting.stage != "ppo":
        return "itself"
    if setting.gather != "auto":
        return setting.gather
    return "copy" if estimate(model, setting, launch).total <= FULL * memory else "layers"


def _merged(model: Measured, setting: Setting) -> int:
    """Bytes of a model in bfloat16, adapters merged."""
    return HALF * (model.parameters - model.trained * setting.lora)


def _in_slices(model: Measured, setting: Setting, launch: str) -> int:
    """Bytes of a copy in bfloat16: its slice, the block in use and the next one."""
    here = 0 if launch in OFFLOADED else model.parameters // setting.gpus
    outer = model.parameters - model.num_blocks * model.block
    return HALF * (here + max(2 * model.block, outer))


def gathered_per_token(model: Measured, setting: Setting) -> int:
    """Bytes of the slices of all GPUs together, which "layers" gathers for each token: of a copy in
    bfloat16, or of a policy that is stored so."""
    if setting.dtype == "float32":
        return _merged(model, setting)
    return model.weights - FLOAT * model.trained * setting.share_base


def _trained(model: Measured, setting: Setting, launch: str) -> ModelMemory:
    """A model that trains; its activations are those that do not depend on rows."""
    gradients = FLOAT * model.trained
    n = setting.gpus
    # with checkpointing, autocast's copies of a block's weights go with its activations
    copies = model.copies // (model.num_blocks if setting.checkpointing else 1)
    if launch == "ddp":
        return ModelMemory(model.weights, gradients * (1 + (n > 1)), 2 * gradients, copies)
    is_ppo, outer = setting.stage == "ppo", model.parameters - model.num_blocks * model.block
    unit = max(model.block, outer)
    own = gradients // n  # of what DeepSpeed steps, a copy of weights, and of joined gradients
    if launch == "zero2":
        bucket = FLOAT * (unit if is_ppo else BUCKET) + copies
        return ModelMemory(model.weights + own, 2 * own, 2 * own, bucket)
    if setting.share_base:
        return _on_base(model, setting, launch, copies)
    # the block in use, the next one, the gradient of one; embeddings and head for the whole pass
    used = FLOAT * (3 * model.block + max(outer, 0)) + copies
    if launch.startswith("zero3"):
        kept = 3 * unit if is_ppo else min(model.parameters, LIVE) + BUCKET
        used = FLOAT * kept + copies
    if launch in OFFLOADED:
        return ModelMemory(0, 0, 0, used)
    if launch == "zero3":
        return ModelMemory(model.weights // n + own, 2 * own, 2 * own, used)
    return ModelMemory(model.weights // n, gradients // n, 2 * gradients // n, used)


def _on_base(model: Measured, setting: Setting, launch: str, copies: int) -> ModelMemory:
    """A policy on a base in slices. Its adapters are whole, and averaged in one tensor."""
    adapters = FLOAT * model.trained
    base = model.weights - adapters
    number = base / max(model.parameters - model.trained, 1)  # bytes of one, as stored
    outer = model.parameters - model.num_blocks * model.block
    used = int(number * max(2 * model.block, outer)) + copies  # the block in use, the next one
    here = 0 if launch in OFFLOADED else base // setting.gpus
    return ModelMemory(here + adapters, 2 * adapters, 2 * adapters, used)


def _reference(model: Measured, setting: Setting, launch: str) -> ModelMemory:
    if launch in SLICED:
        return ModelMemory(0 if launch in OFFLOADED else model.weights // setting.gpus)
    return ModelMemory(HALF * model.parameters)


def main_memory(model: Measured, setting: Setting, launch: str) -> int:
    """Bytes that all processes keep in main memory: the slices of an offload, and in PPO the copy
    from which a checkpoint is written."""
    num_models = 1 + (setting.critic and setting.stage == "ppo")
    trained = num_models * FLOAT * model.trained
    by_thread = setting.stage == "ppo" and not launch.startswith("zero")
    copy = 3 * trained * by_thread  # and Adam's two moments
    if launch not in OFFLOADED:
        return copy
    if setting.stage == "ppo" and setting.gather == "layers" and setting.dtype == "float32":
        copy += _merged(model, setting)  # slices that sample
    if setting.share_base:
        return copy + model.weights - FLOAT * model.trained
    kept = 5 if launch == "zero3_offload" else 3  # gradients and Adam; DeepSpeed's copies of both
    return copy + num_models * model.weights + kept * trained


def rows_that_fit(model: Measured, setting: Setting, launch: str, memory: int) -> int:
    """The most rows at a time that leave some memory free; 0 if one does not fit."""
    room = FULL * memory

    def fits(rows: int) -> bool:
        return estimate(model, setting, launch, rows).total <= room

    low, high = 0, 1
    while high <= 4096 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
