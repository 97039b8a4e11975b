"""Milliseconds per token of sampling: our engines and transformers' `generate`, against the limit.

Held equal: the model (random weights, responses run to the limit), the prompts, the number of rows
and of tokens, float32 on a CPU and bfloat16 on a GPU. The samplers take turns. On one thread of a
CPU, seconds are those of the process. The time of a token is that of all rows together: (seconds of
the whole response - seconds of its first token) / tokens in between, so the time to read the
prompts is left out.

The limit is the longer of two times: to read the weights and the rows' keys and values once, and to
multiply by the weights, at the rates that this machine reached in the same run.

Left out: finished rows (they make our engines faster), weight updates, LoRA.

Run: python examples/benchmarks/decode.py --preset small --rows 64
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar
from world import (
    DEVICE,
    SHAPES,
    describe,
    end_responses,
    machine,
    make_model,
    make_prompts,
    make_tokenizer,
    num_matrix_weights,
    seconds_of,
    table,
)

from rlhf.data import pad
from rlhf.models import freeze
from rlhf.sampling import generate, sampling_for, uniform_noise, use_engine

TRANSFORMERS = "transformers"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=SHAPES, default="small")
    default = f"loop,graph,{TRANSFORMERS}" if DEVICE == "cuda" else f"loop,{TRANSFORMERS}"
    parser.add_argument("--samplers", default=default, help="loop, graph, ...")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of a response")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def samplers(model: Any, options: argparse.Namespace) -> dict[str, Callable[[int], Any]]:
    """Name -> a function that samples that many tokens for all rows."""
    prompts = make_prompts(options.preset, options.rows)
    tokenizer = make_tokenizer(options.preset)
    noise = uniform_noise((0,), range(options.rows), options.tokens)
    ids = pad(prompts, tokenizer.pad_token_id, "left", model.device)
    mask = pad([[1] * len(row) for row in prompts], 0, "left", model.device)

    names = options.samplers.split(",")
    engines = {name: use_engine(model, name) for name in names if name != TRANSFORMERS}

    def ours(name: str, num_tokens: int) -> Any:
        engines[name].use()  # each is kept: graphs are captured once
        sampling = sampling_for(model, tokenizer, num_tokens, temperature=1.0)
        return generate(model, prompts, sampling, noise, batch_size=options.rows)

    def theirs(num_tokens: int) -> Any:
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
        )

    def named(name: str) -> Callable[[int], Any]:
        return theirs if name == TRANSFORMERS else lambda num_tokens: ours(name, num_tokens)

    return {name: named(name) for name in names}


def limit_seconds(model: Any, options: argparse.Namespace, limits: dict[str, Any]) -> float:
    """Least time of a token of all rows on this machine, half-way through the response."""
    hidden, _, layers, _, _ = SHAPES[options.preset]
    weights = sum(num_matrix_weights(model))
    length = 40 + options.tokens / 2  # prompts have 40 tokens on average
    cache = 2 * layers * hidden * length * options.rows
    read = (weights + cache) * model.dtype.itemsize / limits["bytes_per_second"]
    return max(read, 2 * weights * options.rows / limits["flops_per_second"])


def measure(
    functions: dict[str, Callable[[int], Any]], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds per token of each sampler, in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(options.repeats + 1):
        for name, sample in functions.items():
            whole = seconds_of(partial(sample, options.tokens), 1, warm=0)
            first = seconds_of(partial(sample, 1), 1, warm=0)
            if number:  # the first round warms up
                times[name].append((whole - first) / (options.tokens - 1))
        print(f"round {number + 1} of {options.repeats + 1}", file=sys.stderr)
    return times


def summary(times: dict[str, list[float]], limit: float) -> dict[str, Any]:
    """Medians, next to the limit (seconds) and to transformers."""
    base, found = times.get(TRANSFORMERS), {}
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        found[name] = {"ms_per_token": 1e3 * middle, "times_the_limit": middle / limit}
        if base:
            pairs = zip(seconds, base, strict=True)
            found[name]["ratio_to_transformers"] = statistics.median(a / b for a, b in pairs)
    cells = []
    for name, values in found.items():
        far = values["times_the_limit"]
        cells.append(f"{name} {values['ms_per_token']:.3g} ms/token ({far:.1f} x limit)")
    return {"limit_ms": 1e3 * limit, "samplers": found, "headline": ", ".join(cells)}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    limits = machine()
    print(describe(limits), flush=True)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    model = freeze(make_model(LlamaForCausalLM, options.preset, 1, dtype))
    end_responses(model, 0.0)
    times = measure(samplers(model, options), options)
    result = summary(times, limit_seconds(model, options, limits))
    size = f"{options.rows} rows, {options.tokens} tokens"
    print(f"{size}: limit {result['limit_ms']:.3g} ms per token\n")
    found = result["samplers"]
    columns = list(next(iter(found.values())))
    print(table(["sampler", *columns], [[name, *found[name].values()] for name in found]))
    print("\n" + json.dumps(result | {"machine": limits, "settings": vars(options)}))


if __name__ == "__main__":
    main()
