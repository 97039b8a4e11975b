"""Scorers with one fault each, and a preflight whose printed found can be looked at."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from helpers.tiny_ppo import WORDS, make_config, make_trainer

from rlhf.data import encode_prompts
from rlhf.ppo.preflight import PreflightFailed, run_preflight


def letters(prompts, responses):
    """Score a response by the share of letters in its first ten characters: not by its length."""
    return [sum(map(str.isalpha, r[:10])) / (len(r[:10]) or 1) for r in responses]


def constant(prompts, responses):
    return [0.25] * len(responses)


def some_nan(prompts, responses):
    return [math.nan if len(r) > 5 else 1.0 for r in responses]


def noisy(prompts, responses):
    """Score with noise from every global generator."""
    noise = [random.random() + np.random.rand() + float(torch.rand(())) for _ in responses]
    return [a + b for a, b in zip(letters(prompts, responses), noise, strict=True)]


def leaky(prompts, responses):
    """Average over the padded width: the longest response of a batch changes the others' scores."""
    width = max(map(len, responses))
    return [sum(map(str.isalpha, r)) / width for r in responses]


def slightly_leaky(prompts, responses):
    width = max(map(len, responses))
    return [s + 1e-5 * width for s in letters(prompts, responses)]


def one_at_most(prompts, responses):
    """Break on a single response, as a forgotten `squeeze` does."""
    return torch.tensor(letters(prompts, responses)).squeeze()


def by_length(prompts, responses):
    return [float(len(r)) for r in responses]


def against_length(prompts, responses):
    return [-float(len(r)) for r in responses]


def very_low(prompts, responses):
    return [s - 5.0 for s in letters(prompts, responses)]


def opposite(prompts, responses):
    return [-s for s in letters(prompts, responses)]


def heldout_prompts(trainer, number=4):
    rows = [{"prompt": f"{WORDS[i]} {WORDS[i + 1]}"} for i in range(number)]
    return encode_prompts(rows, trainer.actors.tokenizer, 64)[0]


def look(trainer, capsys, independent=None, heldout=True):
    """{name: (status, text and remedy)} as printed, the bottom line, and the exception's text."""
    message = ""
    capsys.readouterr()
    try:
        run_preflight(trainer, heldout_prompts(trainer) if heldout else [], independent)
    except PreflightFailed as error:
        message = str(error)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110 and len(lines) <= 33
    found, name = {}, ""
    for line in lines[1:-1]:
        if line[:6].strip():
            name = line[6:20].strip()
            found[name] = (line[:6].strip(), line[20:])
        else:
            found[name] = (found[name][0], f"{found[name][1]} {line.strip()}")
    return found, lines[-1], message


def scored_by(policy_dir, folder, scorer, **ppo):
    """A trainer with a scorer of this file, and no penalty for a missing EOS."""
    config = make_config(policy_dir, folder, **({"missing_eos_penalty": None} | ppo))
    trainer = make_trainer(config, folder)
    trainer.actors.scorer = scorer
    return trainer
