"""The preflight as a whole: a run stays the same, a failure stops it, on one process and on two.

Run: python -m pytest tests/ppo/preflight/test_preflight_and_run.py
"""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest
import torch
from helpers.commands import run_forked
from helpers.ports import held_port
from helpers.preflight import constant, heldout_prompts, letters, look, noisy
from helpers.runs import in_two_processes
from helpers.tiny_ppo import make_config, make_trainer, write_prompts
from safetensors.torch import load_file

from rlhf import train_ppo
from rlhf.config import PeftConfig
from rlhf.ppo.preflight import PreflightFailed, run_preflight
from rlhf.ppo.preflight.findings import Finding, bottom_line, lay_out
from rlhf.ppo.result import PPOResult

OPTIONS = {
    "plain": {},
    "rloo": {"advantage": "rloo", "samples_per_prompt": 4},
    "averages": {"ema_decay": 0.9, "kl_in": "loss", "kl_estimator": "k3"},
}


@pytest.mark.parametrize("name", [*OPTIONS, "lora", "ptx"])
def test_preflight_passes_and_leaves_weights_gradients_and_random_numbers_alone(
    policy_dir, tmp_path, capsys, name
):
    config = make_config(policy_dir, tmp_path, **OPTIONS.get(name, {}))
    config.ppo.missing_eos_penalty, config.watchdog.eos_rate = None, None
    config.peft = PeftConfig(enabled=name == "lora", r=4, dropout=0.5)
    config.critic.warmup_updates = 1 if name == "plain" else 0
    trainer = make_trainer(config, tmp_path)
    if name == "ptx":
        trainer.updater.texts = [list(range(5, 30)), list(range(40, 44))] * 2
        config.ptx.coef = 1.0
    trainer.actors.scorer = letters
    models = [m for m in (trainer.actors.policy, trainer.actors.critic) if m is not None]
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found, bottom, _ = look(trainer, capsys, heldout=name != "rloo")
    statuses = {check: status for check, (status, _) in found.items()}
    assert set(statuses.values()) == {"ok"} and bottom.startswith("preflight: ok (")
    assert len(statuses) == 8
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(old[key], value) for key, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    assert all(not optimizer.state for optimizer in trainer.updater.optimizers.values())
    now = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(states[0], now[0]) and states[1:] == now[1:]


def test_a_run_with_preflight_equals_one_without_bit_for_bit(policy_dir, tmp_path, capsys):
    results = []
    for preflight_knob in (False, True):
        config = make_config(policy_dir, tmp_path, num_updates=2)
        config.preflight, config.run_name = preflight_knob, f"run-{preflight_knob}"
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        results.append(train_ppo(config, scorer=noisy).directory)
    assert capsys.readouterr().out.count("preflight: 16 responses") == 1
    one, two = (load_file(result / "model.safetensors") for result in results)
    assert all(torch.equal(one[name], two[name]) for name in one)
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert (results[0].parent / file).read_bytes() == (results[1].parent / file).read_bytes()


def test_preflight_only_writes_nothing_and_minds_no_finished_run(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    finished = tmp_path / "runs/run/ppo/final"
    finished.mkdir(parents=True)
    (finished / "model.safetensors").write_text("precious")
    paths = sorted(tmp_path.rglob("*"))
    config.preflight = "only"
    assert train_ppo(config, scorer=letters) == PPOResult(None, {})
    with pytest.raises(PreflightFailed, match="scorer: mean score 0.25, .* a constant"):
        train_ppo(config, scorer=constant)
    assert sorted(tmp_path.rglob("*")) == paths


def test_a_failed_check_stops_the_run_before_anything_is_written(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    config.preflight = True
    with pytest.raises(PreflightFailed, match="nothing was trained:\n  scorer: .* a constant"):
        train_ppo(config, scorer=constant)
    assert not (tmp_path / "runs").exists()
    config.preflight = False
    assert train_ppo(config, scorer=constant).directory is not None


def test_exit_status_says_whether_a_check_failed(policy_dir, tmp_path):
    for scorer, status in (("letters", 0), ("constant", 1)):
        command = ["-m", "rlhf.ppo", "run_name=x", "preflight=only"]
        command += [f"model.path={policy_dir}", "dataset=prompt_completion", "critic.init=policy"]
        command += [f"dataset.path={write_prompts(tmp_path / 'prompts.jsonl')}"]
        command += [f"scorer.path=python:helpers.preflight.{scorer}", "scorer.normalize=none"]
        command += ["ppo.batch_size=8", "ppo.response_length=12", "dataset.eval_fraction=0.3"]
        command += ["ppo.missing_eos_penalty=-2", "watchdog.eos_rate=null"]
        done = run_forked(command, tmp_path)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr and "error:" not in done.stderr
        expected = "preflight: failed: scorer" if status else "preflight: "
        assert done.stdout.splitlines()[-1].startswith(expected)
        assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


# --- What is printed ------------------------------------------------------------------------------


def test_report_wraps_long_texts_and_sums_up():
    found = [Finding("memory", "ok", "fits"), Finding("scorer", "WARN", "word " * 60, "do " * 60)]
    lines = lay_out(found).splitlines()
    assert max(map(len, lines)) <= 110 and lines[0] == "ok    memory        fits"
    assert lines[1].startswith("WARN  scorer        word") and lines[2].startswith(" " * 20 + "w")
    assert sum("-> do" in line for line in lines) == 1
    assert bottom_line(found[:1]) == "ok" and bottom_line(found) == "1 warning"
    assert bottom_line(found * 2) == "2 warnings"
    assert bottom_line([*found, Finding("length", "FAIL", "")]) == "failed: length"


# --- Several processes ----------------------------------------------------------------------------


def run_rank(rank, port, config, folder):
    """One process of two: look twice, and write down what came of it."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in values.items()}
    trainer = make_trainer(config, folder)
    heldout = heldout_prompts(trainer, 3)
    assert len({len(p["input_ids"]) for p in heldout}) > 1
    before = torch.cat([p.detach().flatten() for p in trainer.actors.policy.parameters()])
    trainer.actors.scorer = letters
    outcomes = [[finding.status for finding in run_preflight(trainer, heldout)]]
    trainer.actors.scorer = constant
    with pytest.raises(PreflightFailed) as raised:
        run_preflight(trainer, heldout)
    after = torch.cat([p.detach().flatten() for p in trainer.actors.policy.parameters()])
    assert torch.equal(before, after)
    trainer.actors.scorer = letters
    ratio_off = trainer.step()["first_ratio_deviation"]  # the processes are still in step
    (folder / f"{rank}.json").write_text(json.dumps([*outcomes, str(raised.value), ratio_off]))


def test_all_processes_come_to_the_same_end(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, missing_eos_penalty=None)
    config.watchdog.eos_rate = None
    with held_port() as port:
        in_two_processes(run_rank, port, config, tmp_path)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == two
    assert one[0] == ["ok"] * 8 and "scorer: mean score 0.25" in one[1] and one[2] == 0.0
