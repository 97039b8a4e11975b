"""Missing values, and the rules between two knobs: each is broken by a row, and named with its fix.

Leaves out the ranges of single knobs (test_ranges.py).
Run: python -m pytest tests/config/test_rules.py
"""

import ast
import inspect
import re

import pytest
from helpers.configs import several, valid_config

from rlhf.config import (
    STAGES,
    InputError,
    PPOStageConfig,
    SFTStageConfig,
    check,
    checks,
    ppo_checks,
    with_default_paths,
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A checkout may hold runs."""
    monkeypatch.chdir(tmp_path)


PYTHON_SCORER = {"scorer.path": "python:my_module.score"}
OFF_POLICY = "or set ppo.allow_off_policy_sampling=true"

# stage, changes, what the message must say
BAD_VALUES = [
    (
        "sft",
        {"peft.enabled": True, "peft.save": "adapter", "model.path": None}
        | {"model.config": {"model_type": "llama"}, "model.tokenizer": "t"},
        "peft.save=adapter needs a base model on the disk or the Hub",
    ),
    ("sft", {"model.quantization": "8bit"}, "only adapters on them; set peft=lora, or model.quant"),
    (
        "sft",
        {"model.quantization": "4bit", "peft.enabled": True, "model.path": None}
        | {"model.config": {"a": 1}, "model.tokenizer": "gpt2"},
        "model.quantization=4bit needs pretrained weights: set model.path",
    ),
    (
        "sft",
        {"model.config": {"a": 1}},
        "model.config={'a': 1} builds a model with random weights, but model.path=model loads a "
        "trained one; set model.path=null, or remove model.config (if a recipe sets it: "
        "~model.config.a)",
    ),
    ("reward", {"model.config": {"a": 1}}, "but model.path=model loads a trained one; remove mod"),
    ("ppo", {"model.config": {"a": 1}}, "but model.path=model loads a trained one; remove model."),
    ("ppo", {"model.dropout": 0.1}, "model.dropout=0.1: PPO uses no dropout, because its"),
    ("sft", {"model.special_tokens": ["", "a"]}, "model.special_tokens must be distinct, non-"),
    ("sft", {"model.stop_strings": ["a", "a"]}, "model.stop_strings must be distinct, non-"),
    (
        "sft",
        {"model.attn_implementation": "flash"},
        "must be one of eager, sdpa, flash_attention_2",
    ),
    (
        "sft",
        {"model.attn_implementation": "flash_attention_2"},
        "model.attn_implementation=flash_attention_2 needs flash-attn; install it or use sdpa",
    ),
    (
        "sft",
        {"model.path": ".", "model.revision": "main"},
        "model.revision=main applies to Hub models, but model.path=. is a local directory",
    ),
    ("sft", {"run_name": "a/b"}, "run_name must be one folder name, got 'a/b'"),
    ("sft", {"run_name": ""}, "run_name must be one folder name, got ''"),
    ("sft", {"run_name": ".."}, "run_name must be one folder name, got '..'"),
    ("sft", {"run_name": "a\nb"}, r"run_name must be one folder name, got 'a\nb'"),
    ("sft", {"run_name": "é" * 128}, "run_name must be one folder name, got 'éééééééé"),
    (
        "sft",
        {"batch_size": 128, "trainer": {"gradient_accumulation_steps": 16}},
        "batch_size=128 sets trainer.gradient_accumulation_steps, which is 16; leave that at 1, or",
    ),
    ("reward", {"dataset.split_long": True}, "dataset.split_long=true splits conversations of SFT"),
    ("ppo", {"dataset.split_long": True}, "dataset.split_long=true splits conversations of SFT"),
    (
        "reward",
        {"batch_size": 64, "reward.tokens_per_batch": 4096},
        "batch_size=64 counts prompts, but reward.tokens_per_batch=4096 puts as many as fit into",
    ),
    (
        "reward",
        {"reward.loss": "plackett_luce", "reward.label_smoothing": 0.1},
        "reward.label_smoothing=0.1 needs reward.loss=pairwise, or 0",
    ),
    ("ppo", {"ppo.adam_betas": [0.9]}, "ppo.adam_betas must be two numbers in [0, 1), e.g. [0.9"),
    ("ppo", {"ppo.adam_betas": [0.9, 1.0]}, "two numbers in [0, 1), e.g. [0.9, 0.95], got [0.9, 1"),
    (
        "ppo",
        {
            "ppo.mask_truncated": True,
            "ppo.whiten_rewards": True,
            "ppo.advantage": "rloo",
            "ppo.samples_per_prompt": 2,
        },
        "ppo.mask_truncated=true and ppo.whiten_rewards=true give truncated responses no rewards, "
        "but "
        "ppo.advantage=rloo compares other responses with them; set ppo.whiten_rewards=false",
    ),
    (
        "ppo",
        {"ppo.scale_scores": True, "ppo.whiten_scores": True},
        "ppo.scale_scores and ppo.whiten_scores both scale the scores; set one to false",
    ),
    (
        "ppo",
        several({"path": "a"}, {"path": "b", "gate": 15.0}),
        "scorer.components[1].gate must lie in (0, 1), got 15.0",
    ),
    (
        "ppo",
        several({"path": "a", "gate": 0.15}),
        "scorer.components need one without a gate, for responses that pass all, got [0.15]",
    ),
    (
        "ppo",
        {"ppo.samples_per_prompt": 3},
        "ppo.batch_size must be divisible by ppo.samples_per_prompt, got 64 and 3",
    ),
    ("ppo", {"ppo.advantage": "rloo"}, "needs ppo.samples_per_prompt >= 2, e.g. 4, got 1"),
    (
        "ppo",
        {"ppo.target_kl": 0.1, "ppo.num_ppo_epochs": 1},
        "ppo.target_kl=0.1 has no step to skip in updates of one; set it to null",
    ),
    ("ppo", {"ppo.kl_in": "loss"}, "ppo.kl_in=loss needs ppo.kl_estimator=k3 or k2: k1 has"),
    ("ppo", {"ppo.kl_target": 6.0, "ppo.kl_coef": 0.0}, "multiplies ppo.kl_coef, which is 0; set"),
    (
        "ppo",
        {"evaluation.select": "independent_score"},
        "evaluation.select=independent_score needs evaluation.scorer=module.score",
    ),
    (
        "ppo",
        {"critic.warmup_updates": 2, "ppo.advantage": "reinforce_pp"},
        "critic.warmup_updates=2 needs a critic (ppo.advantage=gae)",
    ),
    (
        "ppo",
        {"critic.must_explain": True, "ppo.advantage": "reinforce_pp"},
        "critic.must_explain=true needs a critic (ppo.advantage=gae); set it to null",
    ),
    (
        "ppo",
        several({"path": "a", "normalize": "zero"}),
        "scorer.components[0].normalize must be one of demo_mean_zero, standardise, none, null",
    ),
    ("ppo", several({"path": "a"}, path="b"), "give scorer.path=b or scorer.components, not both"),
    (
        "ppo",
        several({"path": "a"}, combine="min"),
        "scorer.combine=min needs two scorer.components or more, got 1",
    ),
    (
        "ppo",
        several({"path": "a", "weight": 0.0}),
        "scorer.components: no weight may be 0, got [0.0]",
    ),
    (
        "ppo",
        several({"path": "a", "weight": 2.0}, {"path": "b"}, combine="mean"),
        "scorer.combine=mean ignores weights, got [2.0, 1.0]; leave them at 1",
    ),
    (
        "ppo",
        several({"path": "runs/a/reward/final"}, {"path": "other/a"}),
        "scorer.components: set names, distinct and of letters, digits and _.-, got ['a', 'a']",
    ),
    ("ppo", several({"path": "a", "name": "a/b"}), "of letters, digits and _.-, got ['a/b']"),
    (
        "ppo",
        several({"path": "python:m.f"}, {"path": "b"}) | {"critic.init": "reward"},
        "critic.init=reward needs a reward model, but scorer.path=python:m.f is none; set ",
    ),
    (
        "ppo",
        {"critic.init": "random"},
        "critic.init must be reward, policy, or the directory of a trained critic "
        "(runs/<run_name>/ppo/critic), got 'random'",
    ),
    (
        "ppo",
        {"ppo.num_mini_batches": 3},
        "ppo.batch_size must be divisible by ppo.num_mini_batches, got 64 and 3",
    ),
    ("ppo", {"ppo.top_p": 0.9}, OFF_POLICY),
    ("ppo", {"ppo.top_k": 50}, OFF_POLICY),
    (
        "ppo",
        {"ppo.top_p": 0.0, "ppo.allow_off_policy_sampling": True},
        "ppo.top_p must lie in (0, 1], got 0.0",
    ),
    (
        "ppo",
        {"scorer.path": "my_module.score", "critic.init": "reward"},
        "is none; set critic.init=policy",
    ),
    (
        "ppo",
        {"ppo.missing_eos_penalty": "high"},
        "ppo.missing_eos_penalty must be a number, null or auto, got 'high'",
    ),
    (
        "ppo",
        {"ppo.micro_batch_tokens": "many"},
        "ppo.micro_batch_tokens must be a number, auto or null, got 'many'",
    ),
    (
        "ppo",
        {"ppo.micro_batch_tokens": 128},
        "ppo.micro_batch_tokens=128 is less than a row: ppo.response_length=128 and a prompt; set "
        "it to 129 or more",
    ),
    (
        "ppo",
        {"ppo.micro_batch_tokens": "auto", "preflight": False},
        "ppo.micro_batch_tokens=auto is chosen by the preflight, which preflight=false leaves out",
    ),
    (
        "ppo",
        {"scorer.path": "my/scores.py"},
        "scorer.path=my/scores.py is a file; name the function in it: scores.<function>",
    ),
    (
        "ppo",
        {"critic.share_trunk": True, "critic.init": "reward"},
        "critic.share_trunk=true puts the value head on the policy's own trunk, but critic.init="
        "reward names another model; set critic.init=null, or critic.share_trunk=false",
    ),
    (
        "ppo",
        {"critic.share_trunk": True, "ppo.advantage": "reinforce_pp"},
        "critic.share_trunk=true needs a critic (ppo.advantage=gae); set it to false",
    ),
    (
        "ppo",
        {"critic.trunk_coef": 0.5},
        "critic.trunk_coef=0.5 needs critic.share_trunk=true: a critic of its own has no gradient "
        "into the policy; set it to 1",
    ),
    (
        "ppo",
        {"offload_frozen": True, "peft.enabled": True, "scorer.path": "my_module.score"},
        "offload_frozen=true has nothing to move: with adapters, the reference is the policy with "
        "its adapters off, and the scorer is no reward model; set it to false",
    ),
    (
        "ppo",
        {"ppo.base": "stacked"},
        "ppo.base=stacked says what one base for all roles holds; set ppo.share_base=true",
    ),
    (
        "ppo",
        {"ppo.share_base": True},
        "ppo.share_base=true trains adapters on a frozen base, not all weights; set peft=lora",
    ),
    (
        "ppo",
        {"ppo.share_base": True, "peft.enabled": True, "ppo.reference": "elsewhere"},
        "ppo.share_base=true makes the base without adapters the reference, but ppo.reference="
        "elsewhere is another model; set ppo.reference=null, or ppo.share_base=false",
    ),
    (
        "ppo",
        {"ppo.share_base": True, "peft.enabled": True, "critic.share_trunk": True},
        "ppo.share_base=true gives the critic an adapter of its own, but critic.share_trunk=true "
        "only a head; set one of them to false",
    ),
    (
        "ppo",
        {"ppo.share_base": True, "peft.enabled": True, "offload_frozen": True},
        "ppo.share_base=true has no frozen model of its own that could leave the GPU; set "
        "offload_frozen=false",
    ),
    (
        "ppo",
        {"sampling.engine": "loop", "sampling.url": "http://127.0.0.1:8000"},
        "sampling.url='http://127.0.0.1:8000' is for sampling.engine=vllm, but sampling.engine="
        "loop; set sampling.engine=vllm, or leave sampling.url out",
    ),
    (
        "ppo",
        {"sampling.gather": "layers", "sampling.engine": "graph"},
        "sampling.gather=layers needs sampling.engine=loop, got graph; or set sampling.gather=auto",
    ),
    ("ppo", {"sampling.engine": "vllm"}, "needs a server: give sampling.url=http://127.0.0.1:8000"),
    (
        "ppo",
        {"sampling.engine": "vllm", "sampling.url": "http://a", "sampling.vllm_python": "python"},
        "give sampling.url=http://a or sampling.vllm_python=python, not both",
    ),
    (
        "ppo",
        {"sampling.engine": "vllm", "sampling.url": "http://a", "sampling.vllm_args": ["-a"]},
        "sampling.vllm_args are for a server that the run starts: give sampling.vllm_python",
    ),
    (
        "sft",
        {"checkpoint.background": True},
        "checkpoint.background=true: only PPO has rollouts to write behind; leave it null",
    ),
    (
        "ppo",
        {"sampling.weights": "nccl"},
        "sampling.weights='nccl' is for sampling.engine=vllm, but sampling.engine=auto; set",
    ),
    (
        "ppo",
        {"sampling.engine": "vllm", "sampling.url": "http://a", "sampling.weights": "adapter"},
        "sampling.weights=adapter sends LoRA adapters, and all weights train; train with peft=lora",
    ),
    (
        "ppo",
        {"sampling.engine": "vllm", "sampling.url": "http://a", "ppo.temperature": 2.5},
        "sampling.engine=vllm: ppo.temperature is at most 2 in vLLM, got 2.5",
    ),
    (
        "ppo",
        {"sampling.engine": "vllm", "sampling.url": "http://a", "ppo.top_k": 5}
        | {"ppo.allow_off_policy_sampling": True},
        "ppo.top_p=1.0 and ppo.top_k=5 also change the log-probs that vLLM gives; leave them at",
    ),
]
MISSING_VALUES = [
    ("sft", {"dataset.path": None}, "dataset.path: file or Hub name of the rows, e.g."),
    ("sft", {"model.path": None}, "model.path: Hub id, directory or GGUF file, e.g."),
    ("sft", {"model.path": None}, "model.tokenizer: Hub id or directory; needed when"),
    ("sft", {"mix.fraction": 0.1}, "mix.path: file or Hub name of the text"),
    ("reward", {"model.path": None}, "model.path: runs/run/sft/final does not exist; run `python "),
    ("reward", {"normalization.completions": "demonstrations"}, "normalization.path: file or Hub"),
    ("ppo", {"ptx.coef": 1.0}, "ptx.path: file or Hub name of the text"),
    ("ppo", {"scorer.path": "python:"}, "scorer.path: a function, e.g. scorer.path=my_"),
    ("ppo", several({"path": "a"}, {}), "missing values:\n  scorer.components[1].path: final/ of"),
]


@pytest.mark.parametrize(
    "stage, changes, message", BAD_VALUES + MISSING_VALUES, ids=lambda x: str(x)[:60]
)
def test_bad_value_is_named_with_what_is_allowed(stage, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        check(valid_config(stage, changes))


def messages_of_checks():
    """A pattern for each message that the checks yield, read from their source."""
    for node in ast.walk(ast.parse(inspect.getsource(checks) + inspect.getsource(ppo_checks))):
        if isinstance(node, ast.Yield):
            parts = getattr(node.value, "values", [node.value])
            yield "".join(
                re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in parts
            )


def test_every_rule_is_broken_by_some_row_of_the_table():
    found = []
    for stage, changes, _ in BAD_VALUES + MISSING_VALUES:
        with pytest.raises(InputError) as caught:
            check(valid_config(stage, changes))
        found += [line.strip() for line in str(caught.value).splitlines()]
    assert [p for p in messages_of_checks() if not any(re.fullmatch(p, m) for m in found)] == []


@pytest.mark.parametrize(
    "stage, changes",
    [
        ("sft", {}),
        ("reward", {}),
        ("ppo", {}),
        ("ppo", {"ppo.top_p": 0.9, "ppo.allow_off_policy_sampling": True}),
        ("ppo", {"ppo.kl_coef": 0.0, "ppo.cliprange_value": None, "ppo.gamma": 0.0}),
        ("ppo", PYTHON_SCORER | {"critic.init": "policy"}),
        ("ppo", {"scorer.path": "my_module.score"}),
        ("ppo", several({"path": "runs/a/reward/final"}, {"path": "runs/b/reward/final"})),
        ("ppo", several({"path": "a"}, {"path": "b", "normalize": "none"}, combine="min")),
        ("ppo", several({"path": "a", "weight": -0.5}, {"path": "python:m.f", "name": "x"})),
        ("ppo", several({"path": "a"}, {"path": "b", "gate": 0.15})),
        ("ppo", {"ppo.adam_betas": [0.0, 0.95], "ppo.lr_warmup_updates": 500}),
        ("ppo", PYTHON_SCORER | {"ppo.advantage": "rloo", "ppo.samples_per_prompt": 4}),
        ("ppo", {"ppo.kl_in": "loss", "ppo.kl_estimator": "k3", "resume": "auto"}),
        ("sft", {"model.path": None, "model.config": {"a": 1}, "model.tokenizer": "gpt2"}),
        ("ppo", {"model.quantization": "4bit", "peft.enabled": True}),
        ("reward", {"model.dropout": 0.0}),
    ],
)
def test_good_values_pass(stage, changes):
    check(valid_config(stage, changes))


@pytest.mark.parametrize(
    "stage, keys",
    [
        ("sft", ["dataset.path", "model.path", "model.tokenizer", "mix.path"]),
        ("reward", ["dataset.path", "model.path"]),
        ("ppo", ["dataset.path", "model.path", "scorer.path", "ptx.path"]),
    ],
)
def test_all_missing_values_are_reported_at_once(stage, keys, tmp_path):
    with pytest.raises(InputError) as caught:
        config = STAGES[stage](runs_dir=str(tmp_path), run_name="mine")
        if isinstance(config, PPOStageConfig):
            config.ptx.coef = 1.0
        if isinstance(config, SFTStageConfig):
            config.mix.fraction = 0.05
        check(config)
    title, *lines = str(caught.value).splitlines()
    assert title == "missing values:"
    assert [line.split(":")[0].strip() for line in lines] == keys
    assert all("e.g. " in line or "run_name=mine" in line or "needed" in line for line in lines)


def test_directories_of_the_same_run_stand_in_for_missing_paths(tmp_path):
    for stage in ("sft", "reward"):
        (tmp_path / "mine" / stage / "final").mkdir(parents=True)
    config = PPOStageConfig(runs_dir=str(tmp_path), run_name="mine")
    config.dataset.path = "rows.jsonl"
    check(config)


def test_the_reward_model_of_the_run_does_not_join_the_components(tmp_path):
    (tmp_path / "run/reward/final").mkdir(parents=True)
    config = valid_config("ppo", several({"path": "a"}) | {"runs_dir": str(tmp_path)})
    assert with_default_paths(config).scorer == config.scorer
