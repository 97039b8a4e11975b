"""What the preflight advises can be typed: every setting that it proposes is an override of PPO.

Run: python -m pytest tests/ppo/preflight/test_preflight_remedies.py
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.configs import valid_config
from helpers.tiny import tiny_tokenizer
from omegaconf import OmegaConf

import rlhf.ppo.preflight
from rlhf.checkpoint import make_record
from rlhf.config import (
    PPOStageConfig,
    SFTStageConfig,
    config_keys,
    plain_values,
    problems_of,
    schema,
)
from rlhf.overrides import wrong_overrides
from rlhf.ppo.preflight import longest_step, memory, samples
from rlhf.ppo.preflight.findings import Finding
from rlhf.sampling import Generation, Sampling

SETTING = re.compile(r"[a-z]\w*(?:\.[a-z]\w*)*=[^\s;,:)]*[^\s;,:).]")  # ppo.response_length=19
KEY = re.compile(r"\b(?:ppo|model|scorer|critic|evaluation|dataset)\.[a-z]\w*")
PYTHON = {"scorer.path": "python:my_module.score", "critic.init": "policy"}
LORA = {"peft.enabled": True}


# --- Every failure --------------------------------------------------------------------------------


def lacks(part: str, config: PPOStageConfig) -> Finding:
    """Of a run that does not fit, mostly because of one part."""
    sizes = dict.fromkeys(("weights", "gradients", "adam", "activations"), 1) | {part: 100}
    sampling = sizes.pop("sampling", 0)
    estimate = memory.MemoryEstimate({"policy": memory.ModelMemory(**sizes)}, sampling)
    return memory.examine_memory(estimate, 1, config)


def bad_step(problem: str, config: PPOStageConfig) -> Finding:
    estimate = memory.MemoryEstimate({"policy": memory.ModelMemory(9, 9, 9, 9)}, 9)
    step, part = longest_step.Step(1.0, 1, problem), Part(torch.zeros(2, 3), torch.zeros(2, 3))
    return longest_step.examine_longest_step(step, estimate, 1, part, config)


class Part(list):
    def __init__(self, prompt_ids, response_ids):
        self.prompt_ids, self.response_ids = prompt_ids, response_ids


def endless(num_ended: int, remedy: str = "", forbidden: int = 1) -> Finding:
    """Of a policy that ends few of its answers, or some within a larger budget."""
    rollout = SimpleNamespace(finished=torch.zeros(4), lengths=torch.ones(4))
    longer = Generation([[5] * 9] * 4, [[0.0] * 9] * 4, [i < num_ended for i in range(4)])
    sampling = Sampling(10, (7,), torch.tensor([0, forbidden]))
    return samples.examine_stop_token(7, sampling, rollout, 0.5, lambda: (30, longer), remedy)


def endless_of(stage: str | None, can_chat: bool = False) -> Finding:
    config = SFTStageConfig()
    record = make_record(stage, config, "runs/a/sft/final", tiny_tokenizer()) if stage else None
    return endless(0, samples.remedy_for_no_end("runs/a/final", record, can_chat))


def scorer(kind: str) -> Finding:
    scores, lengths = torch.arange(12.0), torch.arange(12)
    draws = iter(range(100))
    wrong = {
        "constant": lambda rows: torch.zeros(len(rows)),
        "noisy": lambda rows: torch.full((len(rows),), float(next(draws))),
        "leaky": lambda rows: torch.full((len(rows),), float(len(rows))),
    }[kind]
    own = torch.zeros(12) if kind == "constant" else scores
    return samples.examine_scorer(wrong, own, lengths, 0.0, 1e-4)


def tokenizer(**changes) -> Finding:
    from tokenizers import normalizers

    own = tiny_tokenizer()
    own.backend_tokenizer.normalizer = normalizers.Lowercase()
    prompt = [{"role": "user", "content": "Hi"}] if changes.get("talk") else "The Seine"
    return samples.examine_tokenizer(own, [prompt], [])


def apart() -> Finding:
    rollout = SimpleNamespace(logprobs=torch.zeros(2, 3), ref_logprobs=torch.ones(2, 3))
    return samples.examine_first_ratio(0.5, rollout, 0.01)


SCORES = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 4)
FAILURES = {
    "not finite": partial(bad_step, "not finite"),
    "out of memory": partial(bad_step, "out of memory"),
    "first ratio": lambda config: apart(),
    "tokenizer": lambda config: tokenizer(),
    "template": lambda config: tokenizer(talk=True),
    "eos": lambda config: endless(0, forbidden=7),
    "budget": lambda config: endless(4),
    "sft": lambda config: endless_of("sft"),
    "ppo": lambda config: endless_of("ppo"),
    "hub": lambda config: endless_of(None),
    "hub, chat": lambda config: endless_of(None, can_chat=True),
    "constant": lambda config: scorer("constant"),
    "noisy": lambda config: scorer("noisy"),
    "leaky": lambda config: scorer("leaky"),
    "length": lambda config: samples.examine_length(torch.arange(9.0), torch.arange(9)),
    "penalty": lambda config: samples.examine_penalty(torch.zeros(2), 1.0),
    "checkpoint": lambda config: memory.examine_main_memory(2, 1),
    "alike": lambda config: samples.examine_best_of_n(torch.ones(4, 4), None, 0.0),
    "judged": lambda config: samples.examine_best_of_n(SCORES, -SCORES, 0.0),
}
for part in ("weights", "gradients", "adam", "activations", "sampling"):
    FAILURES[part] = partial(lacks, part)
CONFIGS = {
    "reward model": {},
    "function": PYTHON,
    "lora": LORA,
    "lora, function": PYTHON | LORA,
    "tokens": {"ppo.micro_batch_tokens": 2048},
    "background": {"checkpoint.background": True},
    "copy": {"sampling.gather": "copy", "sampling.dtype": "bfloat16"},
    "tokens of a row": {"ppo.micro_batch_tokens": 64, "ppo.response_length": 48},
}


def found(name: str, changes: dict) -> tuple[Finding, set[str]]:
    """A finding, and the settings that it proposes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)  # a GPU has settings of its own
        patch.setattr(memory, "loads_in_slices", lambda: True)
        finding = FAILURES[name](valid_config("ppo", changes))
    return finding, {*SETTING.findall(finding.remedy), *filter(None, [finding.override])}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", FAILURES)
def test_settings_that_a_finding_proposes_are_overrides_of_ppo(name, changes):
    finding, settings = found(name, changes)
    assert finding.status != "ok" and finding.remedy
    assert set(KEY.findall(finding.remedy)) <= set(config_keys(PPOStageConfig))
    assert wrong_overrides(sorted(settings), "ppo", own_files=False) == {}
    values = OmegaConf.merge(schema(PPOStageConfig), plain_values(valid_config("ppo", changes)))
    for setting in settings - {"peft=lora"}:
        config = OmegaConf.to_object(OmegaConf.merge(values, OmegaConf.from_dotlist([setting])))
        assert problems_of(config) == ([], []), setting


def texts_of(file: Path) -> Iterator[str]:
    """Every text in a Python file; 1 takes the place of a number or name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(p.value if isinstance(p, ast.Constant) else "1" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_source_names_no_other_setting():
    cases = product(FAILURES, CONFIGS.values())
    tried = {setting for name, changes in cases for setting in found(name, changes)[1]}
    others = {"preflight=false", "scorer.batch_size=1", "evaluation.scorer=null", "recipe=demo"}
    assert wrong_overrides(sorted(others), "ppo", own_files=False) == {}
    known = {setting.partition("=")[0] for setting in tried | others}
    for file in Path(rlhf.ppo.preflight.__file__).parent.glob("*.py"):
        for text in texts_of(file):
            assert {s.partition("=")[0] for s in SETTING.findall(text)} <= known, text
