"""What the benchmarks' figures rest on. The benchmarks themselves run in `make gpu-check DRY=1`.

Run: python -m pytest tests/end_to_end/test_benchmarks.py
"""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import ROOT
from transformers import LlamaForCausalLM

from rlhf.sampling import generate, sampling_for, uniform_noise

FOLDER = ROOT / "examples/benchmarks"
BENCHMARKS = [path.stem for path in FOLDER.glob("*.py")]


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in BENCHMARKS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("lengths", ["full", "half"])
def test_random_policies_of_the_benchmarks_end_as_they_say(lengths):
    import world
    from ppo_step import HALF

    limit = 32
    model = world.make_model(LlamaForCausalLM, "tiny", 1)
    world.end_responses(model, HALF / limit if lengths == "half" else 0.0)
    sampling = sampling_for(model, world.make_tokenizer("tiny"), limit, temperature=1.0)
    prompts = world.make_prompts("tiny", 256)
    found = generate(model, prompts, sampling, uniform_noise((0,), range(256), limit))
    mean = sum(map(len, found.ids)) / 256
    if lengths == "full":
        assert mean == limit and not any(found.finished)
    else:  # four standard errors of the mean are 2.6
        assert abs(mean - limit / 2) < 2.6
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(prompts[:1])).logits
    assert logits.softmax(-1)[..., world.PAD].max() < 1e-9  # TRL may sample padding


def test_one_part_that_fails_does_not_stop_the_others(tmp_path, capsys):
    from parts import run_all, run_part

    named = f"sleep 900; exit # {tmp_path}"
    codes = {
        "bad": "raise SystemExit('no such thing')",
        "slow": f"import subprocess; subprocess.Popen(['sh', '-c', {named!r}]).wait()",
        "good": 'print(\'text\'); print(\'{"headline": "2 s", "x": 1}\')',
    }

    def run(name):
        limit = 1 if name == "slow" else 300
        return run_part(name, [sys.executable, "-c", codes[name]], tmp_path, {}, limit)

    assert run_all(list(codes), run, tmp_path) == 1
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2].startswith("| bad | failed |") and "no such thing" in lines[2]
    assert re.match(r"\| slow \| failed \| \d+ \| not done after 1 s", lines[3])
    deadline = time.monotonic() + 120
    while (left := commands_with(named)) and time.monotonic() < deadline:
        time.sleep(0.01)  # a process that is killed takes a moment to end
    assert not left  # the next part has the machine to itself
    assert lines[4].startswith("| good | ok |") and lines[4].endswith("| 2 s |")


def commands_with(text: str) -> list[str]:
    """Command lines of the processes that run, those with a text."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(file.read_bytes().decode(errors="replace"))
    return [command for command in found if text in command]


def test_limit_of_decoding_is_the_longer_of_reading_and_multiplying_by_hand():
    from argparse import Namespace

    import world
    from decode import limit_seconds

    model = world.make_model(LlamaForCausalLM, "tiny", 1)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 256 + 2 * 64) + 64 + 512 * 64  # layers, norm, head
    cache = 8 * (40 + 5) * 2 * 2 * 64  # rows x tokens x keys and values x layers x width
    options = Namespace(preset="tiny", rows=8, tokens=10)
    slow_memory = {"bytes_per_second": 1e3, "flops_per_second": 1e12}
    expected = (weights + cache) * 4 / 1e3
    assert limit_seconds(model, options, slow_memory) == pytest.approx(expected, rel=1e-12)
    slow_matrix = {"bytes_per_second": 1e12, "flops_per_second": 1e3}
    expected = 2 * weights * 8 / 1e3
    assert limit_seconds(model, options, slow_matrix) == pytest.approx(expected, rel=1e-12)


def test_the_gold_share_counts_words_of_the_first_eighth_and_no_special_tokens():
    from argparse import Namespace

    from ppo_step import gold_share

    options = Namespace(preset="tiny", limit=32)  # 512 words: gold are t4 to t67
    assert gold_share("t4 <sep> t67 t68 <bos> t511 t30", options) == 3 / 32
    assert gold_share("", options) == 0.0


def test_learning_costs_the_seconds_until_the_goal():
    from ppo_step import learning

    rows = [
        {"score": score, "seconds": 1.0 + i, "cpu_seconds": 0.5, "kl": 10.0 * i}
        for i, score in enumerate((0.1, 0.95, 0.2, 0.99))
    ]
    found = learning(SimpleNamespace(rows=rows))
    assert found == {"update": 2, "seconds": 3.0, "cpu_seconds": 1.0, "kl": 10.0}
    assert learning(SimpleNamespace(rows=rows[:1])) == {"update": None, "best": 0.1}


def test_a_token_costs_the_seconds_of_all_updates_over_their_tokens(monkeypatch):
    from argparse import Namespace

    import episodes

    updates = [{"seconds": 9.0, "cpu_seconds": 2.0, "tokens": 100.0}]
    updates.append({"seconds": 9.0, "cpu_seconds": 4.0, "tokens": 200.0})
    row = {"updates": updates}
    monkeypatch.setattr(episodes, "DEVICE", "cpu")
    episodes.summarize(row, Namespace(threads=1))
    assert (row["tokens"], row["seconds"]) == (150.0, 3.0)
    assert row["ms_per_token"] == pytest.approx(20.0)


def test_the_episodes_are_updates_of_our_side_with_as_many_responses(monkeypatch):
    import episodes
    import ppo_step

    monkeypatch.setattr(sys, "argv", ["episodes.py", "--set", "ppo.lam=1"])
    options = ppo_step.parse(episodes.command_of(episodes.parse(), 128))
    assert (options.batch, options.sides, options.set) == (128, "ours", ["ppo.lam=1"])
    assert options.lengths == "half"


def command_lines():
    """The script and the arguments of each part of `make bench` and of `make gpu-check`."""
    from run_all import PARTS

    spec = importlib.util.spec_from_file_location("gpu_check", FOLDER / "gpu_check/__main__.py")
    gpu_check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_check)
    lines = {name: [str(FOLDER / line[0]), *line[1:]] for name, line in PARTS.items()}
    for part in gpu_check.PARTS:
        for dry in (False, True):
            lines[f"gpu {part}, dry={dry}"] = gpu_check.command_of(part, Path("out"), dry)[1:]
    return {name: line for name, line in lines.items() if line[0].startswith(str(FOLDER))}


def test_each_part_names_options_that_its_benchmark_has(monkeypatch):
    lines = command_lines()
    assert {"ppo", "sft", "gpu sft7b, dry=False", "gpu trl, dry=True"} <= lines.keys()
    for name, (script, *arguments) in lines.items():
        module = Path(script).stem
        if module == "demo":
            continue
        needs_no_trl = ["--sides", "ours"] if module == "ppo_step" else []
        monkeypatch.setattr(sys, "argv", [script, *arguments, *needs_no_trl])
        options = importlib.import_module(module).parse()  # exits where an option is unknown
        assert getattr(options, "folder", None) is None, name
