"""What the benchmarks share: models and prompts made from seeds, and what the machine can do.

Left out: rlhf itself, so that the side with TRL 1.12.0, which has an environment of its own, can
import this file too.
"""

from __future__ import annotations

import random
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
PAD, EOS, BOS, SEP = range(4)
SHAPES = {  # hidden size, intermediate size, layers, heads, vocabulary
    "tiny": (64, 256, 2, 4, 512),
    "small": (256, 1024, 4, 8, 2048),
    "medium": (512, 2048, 8, 8, 8192),
    "1b": (2048, 8192, 16, 16, 32_000),  # 1.2 B parameters
    "7b": (4096, 11_008, 32, 32, 32_000),
}
SHAPES["7b-lora"] = SHAPES["7b"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# --- Models and prompts ---------------------------------------------------------------------------


def make_tokenizer(preset: str) -> PreTrainedTokenizerFast:
    """Words t4, t5, ... as tokens."""
    words = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS, "<sep>": SEP}
    words |= {f"t{i}": i for i in range(4, SHAPES[preset][4])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<sep>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


def make_model(cls: Any, preset: str, seed: int, dtype: torch.dtype = torch.float32, **more: Any):
    """A Llama with random weights, made on the device."""
    hidden, intermediate, layers, heads, vocabulary = SHAPES[preset]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        **more,
    )
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        return cls._from_config(config, dtype=dtype)


def make_prompts(preset: str, count: int, seed: int = 1) -> list[list[int]]:
    """Token ids of prompts of 16 to 64 tokens."""
    rng, vocabulary = random.Random(seed), SHAPES[preset][4]
    lengths = [rng.randint(14, 62) for _ in range(count)]
    return [[BOS, *(rng.randrange(4, vocabulary) for _ in range(n)), SEP] for n in lengths]


@torch.no_grad()
def end_responses(model: Any, chance: float) -> None:
    """Make every token of a random policy EOS with this chance, and padding never.

    Dimension 0 of the hidden states becomes a constant that no layer changes; the head reads it.
    """
    inner, head = model.model, model.lm_head.weight
    inner.embed_tokens.weight[:, 0] = 1.0
    for layer in inner.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    head[:, 0] = 0.0
    hidden = inner(input_ids=torch.tensor([[BOS, *range(4, 36)]], device=head.device))[0]
    constant = float(hidden[0, :, 0].mean())
    others = float((hidden[0].float() @ head.float().T).logsumexp(-1).mean())
    logit = torch.tensor(chance / (1 - chance)).log() + others if chance else others - 30.0
    head[[EOS, PAD]] = 0.0
    head[EOS, 0], head[PAD, 0] = float(logit) / constant, (others - 30.0) / constant


def is_gold(ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The tokens that the gold reward counts."""
    return (ids >= 4) & (ids < 4 + vocabulary // 8)


def num_matrix_weights(model: Any) -> tuple[int, int]:
    """Weights that multiply every token, and those of the head."""
    head = model.get_output_embeddings()
    outside = [model.get_input_embeddings(), *([] if head is None else [head])]
    total = sum(p.numel() for p in model.parameters())
    return total - sum(
        m.weight.numel() for m in outside
    ), 0 if head is None else head.weight.numel()


# --- The machine ----------------------------------------------------------------------------------


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def clock() -> float:
    """Seconds; on one thread of a CPU those of this process, so that other load does not count."""
    alone = DEVICE == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def seconds_of(function: Any, repeats: int = 5, warm: int = 1) -> float:
    """The shortest of some calls, after `warm` others."""
    times = []
    for _ in range(repeats + warm):
        synchronize()
        began = clock()
        function()
        synchronize()
        times.append(clock() - began)
    return min(times[warm:])


def machine() -> dict[str, Any]:
    """What this machine reaches at most: FLOP/s in a large matrix product, and bytes/s in reading a
    large matrix once; bfloat16 on a GPU, float32 on a CPU."""
    import transformers

    gpu = DEVICE == "cuda"
    dtype, size = (torch.bfloat16, 8192) if gpu else (torch.float32, 1024)
    square = torch.randn(size, size, device=DEVICE, dtype=dtype)
    matmul = seconds_of(lambda: square @ square)
    tall = torch.randn(64 * size, size, device=DEVICE, dtype=dtype)
    vector = torch.randn(size, device=DEVICE, dtype=dtype)
    read = seconds_of(lambda: tall @ vector)
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "flops_per_second": 2 * size**3 / matmul,
        "bytes_per_second": tall.nbytes / read,
    }


def describe(limits: dict[str, Any]) -> str:
    """One line about the machine."""
    rate, width = limits["flops_per_second"] / 1e9, limits["bytes_per_second"] / 1e9
    kind = "bfloat16" if DEVICE == "cuda" else f"float32, {limits['threads']} thread(s)"
    return (
        f"machine: {limits['device']}, {kind}: {rate:,.0f} GFLOP/s in a matrix product, "
        f"{width:,.0f} GB/s in reading memory"
    )


def memory_in_use() -> float:
    """MiB in use: of torch on the GPU, else of the process. The peak is counted anew from here."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    with suppress(OSError):  # refused in some containers: the peak is then that since the start
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_since() -> float:
    """Most memory since `memory_in_use`, MiB."""
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


# --- Output ---------------------------------------------------------------------------------------


def median(rows: list[dict[str, Any]], name: str) -> float:
    """Median of a column."""
    return statistics.median(row[name] for row in rows)


def table(names: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; numbers with three digits."""
    cells = [
        [
            f"{x:.3g}"
            if isinstance(x, float) and x < 1000
            else f"{x:,.0f}"
            if isinstance(x, float)
            else str(x)
            for x in row
        ]
        for row in rows
    ]
    lines = [names, ["---"] * len(names), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
