"""The numbers of the over-optimisation experiment: evaluations of PPO, and best-of-n.

Left out: fits of the curves, and the true KL of best-of-n when samples coincide (the formula is an
upper bound then).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoint import read_record
from rlhf.config import InputError, PPOStageConfig, ScorerConfig, load_config
from rlhf.console import quiet_libraries, say
from rlhf.data import encode_prompt
from rlhf.distributed import default_device
from rlhf.functional import best_of_n, best_of_n_kl, bootstrap_interval
from rlhf.metrics import read_jsonl
from rlhf.models import load_policy
from rlhf.sampling import generate, sampling_for, uniform_noise
from rlhf.scorers import Tokens, load_scorer, score_responses
from rlhf.tokenizer import hash_rendering, load_tokenizer, response_text

NUM_SAMPLES = 128  # of the SFT policy for each held-out prompt
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
BEST_OF_N_KEY = 1 << 32  # selects the random numbers; no PPO update or evaluation has this number
# our names, and the names of the metrics
FIGURES = {"kl": "eval_kl", "proxy": "eval_score", "gold": "eval_independent_score"}

Point = dict[str, Any]
Curve = dict[str, Any]


def read_curve(stage: Path) -> Curve:
    """Read the evaluations of a finished PPO run.

    Returns:
        `kl_coef`, `select`, `select_kl_coef`, `chosen` (the update in `final/`), `path`, and
        `points`: `update` with `kl`, `proxy`, `gold` (each with `_low` and `_high`, the ends of the
        95 % bootstrap interval over prompts) of every evaluation.

    Raises:
        InputError: the run has no evaluations by a second scorer.
    """
    config = load_config(PPOStageConfig, stage / "final/config.yaml")
    record = read_record(stage / "final")
    points = []
    for row in read_jsonl(stage / "metrics.jsonl"):
        if FIGURES["gold"] in row:
            point = {"update": row["step"]}
            for name, metric in FIGURES.items():
                point |= {name + end: row[metric + end] for end in ("", "_low", "_high")}
            points.append(point)
    if record is None or not points:
        raise InputError(
            f"{stage} holds no evaluation by a second scorer; it needs evaluation.scorer and "
            "evaluation.num_prompts > 0"
        )
    select_kl_coef = config.evaluation.select_kl_coef
    return {
        "kl_coef": config.ppo.kl_coef,
        "select": config.evaluation.select,
        "select_kl_coef": config.ppo.kl_coef if select_kl_coef is None else select_kl_coef,
        "chosen": record.metrics["update"],
        "path": str(stage),
        "points": points,
    }


def read_prompts(stage: Path) -> list[Any]:
    """The held-out prompts that a PPO run was evaluated on."""
    return [row["prompt"] for row in read_jsonl(stage / "samples.jsonl") if row["step"] == 0]


def sample_scores(
    config: PPOStageConfig, prompts: list[Any], num_samples: int = NUM_SAMPLES
) -> tuple[Tensor, Tensor]:
    """Sample the SFT policy and score its answers in the same way as PPO does.

    Args:
        config: of a PPO run; `model.path` names the SFT policy.

    Returns:
        Proxy and gold score, (len(prompts), num_samples) float32 each.
    """
    quiet_libraries()
    say(f"\nbest-of-n: {num_samples} samples of the SFT policy for each of {len(prompts)} prompts")
    device = default_device()
    ppo, code = config.ppo, config.model.trust_remote_code
    tokenizer = load_tokenizer(config.model)
    policy: Any = load_policy(config.model, tokenizer)
    sampling = sampling_for(policy, tokenizer, ppo.response_length, ppo.temperature)
    asked = [prompt for prompt in prompts for _ in range(num_samples)]
    ids = [encode_prompt(prompt, tokenizer) for prompt in asked]
    noise = uniform_noise((config.seed, BEST_OF_N_KEY), range(len(ids)), ppo.response_length)
    sampled = generate(policy.to(device), ids, sampling, noise, batch_size=256)
    pairs = zip(sampled.ids, asked, strict=True)
    texts = [response_text(response, tokenizer, prompt) for response, prompt in pairs]
    tokens = Tokens(ids, sampled.ids, hash_rendering(tokenizer))

    def scores_by(scorer: ScorerConfig, field: str) -> Any:
        loaded = load_scorer(scorer, device, field=field, trust_remote_code=code)
        return score_responses(loaded, asked, texts, field, tokens)

    proxy = scores_by(config.scorer, "scorer.path")
    judge = ScorerConfig(path=config.evaluation.scorer, normalize="none")
    gold = scores_by(judge, "evaluation.scorer").total
    if config.eos_penalty is not None:
        penalised = config.eos_penalty + proxy.dense_total
        proxy.total = torch.where(torch.tensor(sampled.finished), proxy.total, penalised)
    return proxy.total.view(-1, num_samples), gold.view(-1, num_samples)


def best_of_n_points(proxy: Tensor, gold: Tensor) -> list[Point]:
    """Scores of the sample that the proxy likes best among n, for n = 1, 2, 4, ...

    Args:
        proxy, gold: (P, N) scores of N samples to each of P prompts; n is at most N.

    Returns:
        `n` with `kl`, `proxy`, `gold`, the latter two with `_low` and `_high`, the ends of the 95 %
        bootstrap interval over prompts.
    """
    points = []
    for n in (n for n in BEST_OF if n <= proxy.shape[1]):
        point: Point = {"n": n, "kl": best_of_n_kl(n)}
        for name, scores in (("proxy", best_of_n(proxy, n)), ("gold", best_of_n(proxy, n, gold))):
            low, high = bootstrap_interval(scores)
            point |= {name: float(scores.mean()), f"{name}_low": low, f"{name}_high": high}
        points.append(point)
    return points


def peak_of(curve: Curve) -> Point:
    """The evaluation with the highest gold score."""
    return max(curve["points"], key=lambda point: point["gold"])


def chosen_of(curve: Curve) -> Point:
    """The evaluation of the update that became `final/`."""
    return next(point for point in curve["points"] if point["update"] == curve["chosen"])
