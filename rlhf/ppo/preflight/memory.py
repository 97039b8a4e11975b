"""Memory of a PPO run: what it will need, what there is, and one step at the longest length.

Weights, gradients and Adam states are counted, so exact. Activations are measured: what autograd
keeps of one and of two rows at the longest length, extended to a micro-batch. Left out, so that the
estimate is a little low: temporaries inside operations, what gradient checkpointing recomputes, a
Python scorer's own memory, and what the libraries take. `measure_step` sees all of that.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf.config import PPOStageConfig
from rlhf.models import inference_mode, prefill_inputs, unwrap_peft
from rlhf.ppo.rollout import Rollout, critic_values, policy_logprobs
from rlhf.ppo.trainer import PPOTrainer
from rlhf.ppo.update import text_loss
from rlhf.scorers import Scorer, reward_models

# of one number of the vocabulary while sampling: logits and log-probs in float32, and three float64
SAMPLER_BYTES = 2 * 4 + 3 * 8


@dataclass
class ModelMemory:
    """Bytes of one model on this process; activations are of one micro-batch."""

    weights: int
    gradients: int = 0
    adam: int = 0
    activations: int = 0


@dataclass
class MemoryEstimate:
    """Bytes that a run needs on this process.

    Attributes:
        models: policy, reference, critic and reward models (together), those that there are.
        sampling: key-value cache and logits of one batch of the rollout, at full length.
    """

    models: dict[str, ModelMemory]
    sampling: int

    def sum(self, *names: str) -> int:
        """Sum some columns over the models."""
        return sum(getattr(model, name) for model in self.models.values() for name in names)

    def largest(self) -> dict[str, int]:
        """Parts of the moment that needs most: an optimiser step or the rollout; policy and critic
        step one after the other."""
        activations = max(model.activations for model in self.models.values())
        step = {
            "weights": self.sum("weights"),
            "gradients and Adam states": self.sum("gradients", "adam"),
            "activations": activations,
        }
        rollout = {
            "weights": self.sum("weights"),
            "gradients and Adam states": self.sum("adam"),  # gradients are dropped after each step
            "the rollout's cache": self.sampling,
        }
        return max(step, rollout, key=lambda parts: sum(parts.values()))

    @property
    def total(self) -> int:
        """Bytes of that moment."""
        return sum(self.largest().values())


@dataclass
class Step:
    """What one forward and backward pass of policy and critic took, on the slowest process.

    Attributes:
        rise: bytes above what was in use before; None where the system does not tell.
        problem: "out of memory", "not finite", or empty.
    """

    seconds: float
    rise: int | None
    problem: str


# --- Estimate -----------------------------------------------------------------------------------


def estimate_memory(
    trainer: PPOTrainer, part: Rollout, independent: Scorer | None = None
) -> MemoryEstimate:
    """Estimate what a run needs on this process.

    Args:
        part: see `longest_micro_batch`.
        independent: the scorer of `evaluation.scorer`.
    """
    actors, sampling = trainer.actors, trainer.settings.sampling
    distributed = trainer.accelerator.num_processes > 1
    policy = model_memory(actors.policy, distributed)
    policy.weights += sum(t.nbytes for t in (trainer.optimization.averages or {}).values())

    def read_policy(rows: Rollout) -> tuple[Tensor, int]:
        logprobs, logits = policy_logprobs(actors.policy, rows, sampling)
        # on the way back: the gradient of the logits, before and after forbidden ids are masked
        return logprobs, 2 * logits.nbytes

    def read_critic(rows: Rollout) -> tuple[Tensor, int]:
        return critic_values(actors.critic, rows), 0

    policy.activations = activation_bytes(read_policy, actors.policy, part)
    models = {"policy": policy}
    if actors.reference is not None:
        models["reference"] = model_memory(actors.reference)
    if actors.critic is not None:
        models["critic"] = model_memory(actors.critic, distributed)
        models["critic"].activations = activation_bytes(read_critic, actors.critic, part)
    judges = [actors.scorer] if independent is None else [actors.scorer, independent]
    weights = [model_memory(m.model).weights for judge in judges for m in reward_models(judge)]
    if weights:
        models["reward models"] = ModelMemory(sum(weights))
    ppo = trainer.config.ppo
    num_rows = min(ppo.rollout_batch_size, ppo.batch_size // trainer.accelerator.num_processes)
    per_row = part.sequence_ids.shape[1] * cache_bytes_per_token(actors.policy, part)
    vocabulary = actors.policy.get_output_embeddings().weight.shape[0]
    return MemoryEstimate(models, num_rows * (per_row + vocabulary * SAMPLER_BYTES))


def model_memory(model: Any, distributed: bool = False) -> ModelMemory:
    """Count weights, gradients and Adam states (two moments; not the step counters).

    What `model.quantization` has packed counts as it stands in memory: 1 byte a number with 8bit
    (its scales, one a row, are left out), half a byte with 4bit and a float32 scale to each 64
    numbers, 0.5625 together.

    Args:
        distributed: gradients stand a second time in the buckets of DistributedDataParallel.
    """
    weights = sum(p.nbytes for p in model.parameters())
    packed = (getattr(p, "quant_state", None) for p in model.parameters())
    weights += sum(state.absmax.nbytes for state in packed if state is not None)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return ModelMemory(weights, trained * (1 + distributed), 2 * trained)


def activation_bytes(
    read: Callable[[Rollout], tuple[Tensor, int]], model: Any, part: Rollout
) -> int:
    """Bytes that a forward pass keeps for the backward pass of a micro-batch.

    Args:
        read: forward pass; returns its result and the bytes that its backward pass takes besides.
        part: rows of equal length, of which two are read.
    """

    def kept(num_rows: int) -> int:
        rows = part.select(torch.arange(num_rows, device=part.scores.device))
        return saved_bytes(lambda: read(rows), model.parameters())

    one = kept(1)
    return one if len(part) == 1 else one + (len(part) - 1) * (kept(2) - one)


def saved_bytes(read: Callable[[], tuple[Tensor, int]], parameters: Iterable[Tensor]) -> int:
    """Bytes of the tensors that autograd saves during `read`, parameters apart, plus those that it
    returns."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()  # views of one storage count once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, besides = read()
    return sum(saved.values()) + besides


@torch.no_grad()
def cache_bytes_per_token(model: Any, part: Rollout) -> int:
    """Bytes of keys and values that generation keeps of one token."""
    ids, mask = part.prompt_ids[:1], part.prompt_mask[:1]
    cache = DynamicCache(config=unwrap_peft(model).config)
    with inference_mode(model):  # gradient checkpointing drops the cache
        model(**prefill_inputs(model, ids, mask), past_key_values=cache, use_cache=True)
    kept = sum(
        t.nbytes for layer in cache.layers for t in vars(layer).values() if torch.is_tensor(t)
    )
    return -(-kept // ids.shape[1])


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still get: of its GPU, else of this machine's RAM."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return _read_kilobytes("/proc/meminfo", "MemAvailable") or _physical_memory()


def remedy(estimate: MemoryEstimate, config: PPOStageConfig) -> str:
    """Name the knobs that shrink the largest part that a knob can shrink."""
    ppo, lora = config.ppo, config.peft.enabled
    knobs = {
        "weights": [] if lora else ["peft=lora"],  # the reference is the policy, adapters off
        "gradients and Adam states": [] if lora else ["peft=lora"],
        "activations": [],
        "the rollout's cache": [],
    }
    if lora and config.model.dtype in ("auto", "float32"):
        knobs["weights"].append("model.dtype=bfloat16")  # the adapters stay in float32
    if lora and config.model.quantization is None:
        knobs["weights"].append("model.quantization=4bit")
    if ppo.micro_batch_size > 1:
        knobs["activations"].append(f"ppo.micro_batch_size={ppo.micro_batch_size // 2}")
    if not config.model.gradient_checkpointing:
        knobs["activations"].append("model.gradient_checkpointing=true")
    if ppo.rollout_batch_size > 1:
        knobs["the rollout's cache"].append(f"ppo.rollout_batch_size={ppo.rollout_batch_size // 2}")
    parts = estimate.largest()
    for name in sorted(parts, key=lambda name: -parts[name]):
        if knobs[name]:
            return f"most of what can be saved are {name}: set {' or '.join(knobs[name])}"
    return "take a smaller model, or lower ppo.max_prompt_length or ppo.response_length"


# --- Measurement --------------------------------------------------------------------------------


def longest_micro_batch(trainer: PPOTrainer) -> Rollout:
    """Build the largest micro-batch that training can meet on a process: the longest prompt, and
    responses that use the whole budget."""
    ppo, sampling = trainer.config.ppo, trainer.settings.sampling
    device, processes = trainer.accelerator.device, trainer.accelerator.num_processes
    num_rows = min(ppo.micro_batch_size, ppo.batch_size // ppo.num_mini_batches // processes)
    prompt = max((p["input_ids"] for p in trainer.prompts), key=len)
    prompt_ids = torch.tensor([prompt] * num_rows, device=device)
    forbidden = set(sampling.forbidden.tolist())
    token = next(i for i in itertools.count() if i not in forbidden)
    response_ids = torch.full((num_rows, sampling.max_new_tokens), token, device=device)
    zeros = torch.zeros(response_ids.shape, device=device)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=torch.ones_like(prompt_ids, dtype=torch.bool),
        response_ids=response_ids,
        response_mask=torch.ones_like(response_ids, dtype=torch.bool),
        loss_mask=torch.ones_like(response_ids, dtype=torch.bool),
        finished=torch.zeros(num_rows, dtype=torch.bool, device=device),
        sampler_logprobs=zeros,
        logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
        scores=zeros[:, 0],
        dense_rewards=zeros,
        component_scores=zeros[:, :0],
        cut=torch.zeros(num_rows, dtype=torch.bool, device=device),
        advantages=zeros + 1.0,
        returns=zeros,
    )


def measure_step(trainer: PPOTrainer, part: Rollout) -> Step:
    """Make one forward and backward pass of policy and critic; weights stay, gradients are dropped.

    Only the result is exchanged between processes: one that runs out of memory leaves no other
    waiting.
    """
    accelerator, device = trainer.accelerator, trainer.accelerator.device
    before = _reset_peak(device)
    began, problem = time.perf_counter(), 0
    try:
        problem = 0 if _forward_and_backward(trainer, part) else 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        problem = 2
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    peak = _peak(device)
    rise = -1 if before is None or peak is None else max(0, peak - before)
    seconds = time.perf_counter() - began
    for optimizer in trainer.optimization.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    mine = torch.tensor([[seconds, rise, problem]], dtype=torch.float64, device=device)
    seconds, rise, problem = accelerator.gather(mine).max(dim=0).values.tolist()
    problems = ("", "not finite", "out of memory")
    return Step(seconds, None if rise < 0 else int(rise), problems[int(problem)])


def _forward_and_backward(trainer: PPOTrainer, part: Rollout) -> bool:
    """Do what one micro-batch of an update does; False if a loss is not finite."""
    optimization, accelerator = trainer.optimization, trainer.accelerator
    optimization.kl_coef = trainer.kl_coef
    with torch.no_grad():
        part.logprobs, _ = policy_logprobs(
            trainer.actors.policy, part, trainer.settings.sampling
        )  # ratios of 1, as in training
    part.ref_logprobs = part.logprobs
    denominator = float(part.loss_mask.sum())
    losses = []
    with ExitStack() as stack:
        for model in (optimization.policy, optimization.critic):
            if model is not None:
                stack.enter_context(accelerator.no_sync(model))
        if optimization.has_critic:
            losses.append(optimization.critic_backward(part, denominator)["value_loss"])
        losses.append(optimization.policy_backward(part, denominator)["policy_loss"])
        if optimization.texts:
            texts = sorted(optimization.texts, key=len)[-trainer.config.ppo.micro_batch_size :]
            loss = text_loss(optimization.policy, texts, denominator)
            accelerator.backward(trainer.config.ptx.coef * loss)
            losses.append(loss.detach())
    return all(bool(loss.isfinite()) for loss in losses)


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch and Python raise where memory ends."""
    # the CPU allocator raises a plain RuntimeError
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def _reset_peak(device: torch.device) -> int | None:
    """Start measuring the highest use; return the use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):  # refused in some containers: the peak is then that since the start
        Path("/proc/self/clear_refs").write_text("5")
    return _read_kilobytes("/proc/self/status", "VmRSS")


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _read_kilobytes("/proc/self/status", "VmHWM")


def _read_kilobytes(file: str, name: str) -> int | None:
    """Bytes under a name in a file of /proc; None where there is none, as on macOS."""
    path = Path(file)
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None


def _physical_memory() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
