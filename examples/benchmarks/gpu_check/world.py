"""What the parts of the GPU check share: models and prompts made from seeds, and what is measured.

The same seeds give TRL's PPO and ours the same weights and prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import statistics
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

PAD, EOS, BOS, SEP = range(4)
SHAPES = {  # hidden size, intermediate size, layers, heads, vocabulary
    "dry": (32, 64, 2, 4, 96),
    "1b": (2048, 5632, 22, 32, 32_000),
    "1.2b": (2048, 8192, 16, 16, 32_000),
    "7b": (4096, 11_008, 32, 32, 32_000),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def options() -> argparse.Namespace:
    """The command line of a part: `--size`, `--lora`, and the file of its figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("figures", type=Path)
    return parser.parse_args()


def make_tokenizer(size: str) -> PreTrainedTokenizerFast:
    """Words t4, t5, ... as tokens."""
    words = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS, "<sep>": SEP}
    words |= {f"t{i}": i for i in range(4, SHAPES[size][4])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<sep>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


def make_model(cls: Any, size: str, seed: int, dtype: torch.dtype = torch.float32, **more: Any):
    """A Llama with random weights, made on the device."""
    hidden, intermediate, layers, heads, vocabulary = SHAPES[size]
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


def make_prompts(size: str, count: int) -> list[list[int]]:
    """Token ids of prompts of 16 to 64 tokens."""
    rng, vocabulary = random.Random(1), SHAPES[size][4]
    lengths = [rng.randint(14, 62) for _ in range(count)]
    return [[BOS, *(rng.randrange(4, vocabulary) for _ in range(n)), SEP] for n in lengths]


def median(rows: list[dict[str, float]], name: str) -> float:
    """Median over all rows but the first, which has first-use costs."""
    return statistics.median(row[name] for row in rows[1:] or rows)


def check_finite(rows: list[dict[str, Any]], *models: Any) -> None:
    """Stop where a metric or a weight is not finite."""
    bad = [name for row in rows for name, x in row.items() if not math.isfinite(x)]
    for model in models:
        bad += [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        raise SystemExit(f"not finite: {', '.join(sorted(set(bad))[:10])}")


def write(file: Path, **figures: Any) -> None:
    """Write the figures of a part, with device, versions and peak memory."""
    import transformers

    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures |= {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peak_gib": (peak or process) / 2**30,
        "finite": True,
    }
    file.write_text(json.dumps(figures, indent=2))
