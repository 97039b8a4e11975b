"""What the README and the pages of docs/ say is true: commands run, rows are read, names exist.

The commands of the README, and after them in the same folder those of docs/, run unchanged, on
files and a Hub cache that a test made and on a machine whose defaults are small. Those of the
README run in forks of one process that has imported torch; slow tests type them in a shell.

Run: python -m pytest tests/end_to_end/test_pages.py, with `-m slow` for the README's with the real
defaults, and for the demo in full
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import take_back_end
from helpers.commands import ROOT, blocks, check_runs, commands, run, run_in_forks
from helpers.processes import PRELOADED
from helpers.tiny import tiny_model, tiny_tokenizer
from omegaconf import OmegaConf

from rlhf.data import FORMATS, check_row
from rlhf.demo.__main__ import closing_table

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
OTHERS = [
    ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "examples/benchmarks/README.md")
]
PAGES = [README, *OTHERS, *DOCS]
BAD_INPUT = {ROOT / "docs/bad-input.md"}  # its settings are wrong on purpose
# Pages with commands that train, in an order in which later ones find what earlier ones made.
TRAINING_PAGES = """getting-started sft reward-models using-the-result checkpoints ppo scaling
    planning extending""".split()
# What makes the commands of docs/ small enough for a test: values in a copy of conf/.
DATASET = {"max_length": 128, "max_rows": 64, "max_eval_rows": 8, "eval_fraction": 0.3}
SMALL = {
    "sft": {"num_samples": 2, "response_length": 8, "trainer": {"max_steps": 2}},
    "reward": {"normalization": {"response_length": 8}, "trainer": {"max_steps": 2}},
    "ppo": {
        "ppo": {"num_updates": 2, "batch_size": 4, "num_ppo_epochs": 1, "response_length": 8},
        "evaluation": {"num_prompts": 2},
    },
}
HUB_ID, COMMIT = "EleutherAI/pythia-410m", "0" * 40


# --- A user's folder and machine ------------------------------------------------------------------


def write_hub_cache(cache: Path) -> None:
    """A tiny model under the name of the README's, whose answers are short."""
    folder = cache / f"models--{HUB_ID.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt_neox", tokenizer, max_position_embeddings=2048)
    with torch.no_grad():  # EOS is likely after every token
        row = model.get_output_embeddings().weight[tokenizer.eos_token_id]
        model.gpt_neox.final_layer_norm.bias += 8 * row / row.norm() ** 2
    model.save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)


def readme_rows() -> list[dict]:
    """The README's rows of SFT, reward and PPO."""
    ((_, text),) = blocks(README, "json")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with the files that the pages name."""
    return write_files(tmp_path_factory.mktemp("user"))


def write_files(folder: Path) -> Path:
    """Write the files that the pages name: rows like the README's."""
    files = dict(zip(("train", "ranked", "prompts"), readme_rows(), strict=True))
    files["answers"] = {"prompt": "Name a fruit.", "response": "An apple."}
    files["questions"] = {"question": "Name a fruit.", "answer": "An apple."}
    for name, row in files.items():
        lines = [json.dumps(row).replace("Name a", f"Name {i} times a") for i in range(120)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> dict[str, str]:
    """Environment in which `python` is this one and the Hub is a cache."""
    cache = tmp_path_factory.mktemp("cache")
    write_hub_cache(cache)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def small_machine(machine, tmp_path_factory) -> dict[str, str]:
    """The same, with the values of `SMALL`, and an `accelerate` that takes a port that is free."""
    package, programs = (tmp_path_factory.mktemp(name) for name in ("package", "bin"))
    for name in ("rlhf", "conf"):
        shutil.copytree(ROOT / name, package / name)
    for name, values in SMALL.items():
        file = package / f"conf/{name}.yaml"
        OmegaConf.save(OmegaConf.merge(OmegaConf.load(file), values, {"dataset": DATASET}), file)
    launch = f'exec {sys.executable} -m accelerate.commands.launch --main_process_port 0 "${{@:2}}"'
    (programs / "accelerate").write_text(f"#!/usr/bin/env bash\n{launch}\n")
    (programs / "accelerate").chmod(0o755)
    path = os.pathsep.join([str(programs), machine["PATH"]])
    return machine | {"PATH": path, "PYTHONPATH": str(package)}


@pytest.fixture(scope="module")
def of_readme(folder, small_machine) -> dict[str, subprocess.CompletedProcess]:
    """What the README's three commands did, and its Python code with one update."""
    (folder / "readme.py").write_text(python_of_readme(num_updates=1))
    given = [*stages_of_readme(), "python readme.py"]
    return run_in_forks(given, PRELOADED, folder, **small_machine)


@pytest.fixture(scope="module")
def after_readme(folder, of_readme) -> Path:
    """The folder after the README's three commands."""
    for command in stages_of_readme():
        assert of_readme[command].returncode == 0, of_readme[command].stderr[-3000:]
    require_results(folder)
    return folder


def stages_of_readme() -> list[str]:
    stages = [command for command in commands(README) if "run_name=mine" in command]
    assert [re.findall(r"rlhf\.(\w+)", command)[0] for command in stages] == [
        "sft",
        "reward",
        "ppo",
    ]
    return stages


def require_results(folder: Path) -> None:
    for stage in ("sft", "reward", "ppo"):
        assert (folder / f"runs/mine/{stage}/final/model.safetensors").is_file()


def python_of_readme(num_updates: int) -> str:
    ((_, code),) = blocks(README, "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    assert "num_updates=20)" in code
    return code.replace("num_updates=20)", f"num_updates={num_updates})")


# --- The README -----------------------------------------------------------------------------------


def test_the_readme_is_one_page_with_a_small_picture():
    text = README.read_text()
    assert len(text.splitlines()) <= 130
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        assert (ROOT / picture).stat().st_size < 150_000


def test_the_readmes_commands_are_those_that_run_here():
    assert [re.findall(r"^[\w.]+ (?:-m )?[\w.]+|^\w+", line)[0] for line in commands(README)] == [
        "python3 -m venv",
        "source .venv",
        "pip install",
        "python -m rlhf.demo",
        "python -m rlhf.sft",
        "python -m rlhf.reward",
        "python -m rlhf.ppo",
    ]


def test_the_readmes_installation_works(tmp_path):
    """Unchanged; without a network, so that what this Python has is there already."""
    pytest.importorskip("editables", reason="pip cannot build here without a network")
    for name in ("rlhf", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    script = "\n".join(["set -e", *commands(README)[:3], "cd /", "python -m rlhf.sft --help"])
    there = sysconfig.get_path("purelib")
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PYTHONPATH": there}
    assert "rlhf.sft" in check_runs(script, tmp_path, **offline)


def test_the_readmes_stages_run(after_readme):
    assert len((after_readme / "runs/mine/ppo/metrics.jsonl").read_text().splitlines()) > 50


@pytest.mark.slow
def test_the_readmes_stages_run_with_the_real_defaults(tmp_path, machine):
    folder = write_files(tmp_path)
    for command in stages_of_readme():
        check_runs(command, folder, **machine)
    require_results(folder)


def test_the_readmes_python_runs(of_readme):
    done = of_readme["python readme.py"]
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("runs/short/ppo/final")


@pytest.mark.slow
def test_the_readmes_python_runs_unchanged(tmp_path, machine):
    (write_files(tmp_path) / "readme.py").write_text(python_of_readme(num_updates=20))
    printed = check_runs("python readme.py", tmp_path, **machine)
    assert printed.rstrip().endswith("runs/short/ppo/final")


def test_the_demos_table_has_the_rows_that_the_readme_shows(tmp_path):
    shown = blocks(README, "")[0][1].splitlines()
    names = "eval_independent_score eval_score eval_kl eval_win_rate update".split()
    metrics = {"ppo": names, "reward": ["eval_accuracy", "eval_longer_wins_accuracy"]}
    for stage, figures in metrics.items():
        (tmp_path / stage / "final").mkdir(parents=True)
        record = {"metrics": dict.fromkeys(figures, 0)}
        (tmp_path / stage / "final/rlhf.json").write_text(json.dumps(record))
    (tmp_path / "ppo/metrics.jsonl").write_text(json.dumps(dict.fromkeys(names, 0)) + "\n")
    table = closing_table(tmp_path).partition("---\n")[2].partition("\n\n")[0].splitlines()
    assert [re.split("  +", row)[0] for row in table] == [re.split("  +", row)[0] for row in shown]


@pytest.mark.slow
def test_the_demo_prints_the_lines_that_the_readme_shows(folder, machine):
    shown = blocks(README, "")[0][1]
    printed = check_runs("python -m rlhf.demo", folder, timeout=3000, **machine)
    for line in shown.splitlines():
        label = re.split(r"\s\s+|\d", line.strip())[0]
        assert label in printed, line


# --- Commands of docs/ ----------------------------------------------------------------------------


@pytest.mark.slow
def test_every_command_of_the_pages_runs(after_readme, small_machine):
    for name in TRAINING_PAGES:
        page = ROOT / f"docs/{name}.md"
        for title, code in blocks(page, "python"):
            if title.endswith(".py"):
                (after_readme / title).write_text(code)
        for command in commands(page):
            continues = command == "python -m rlhf.ppo resume=true run_name=mine"
            if continues:  # as after a kill before the end
                take_back_end(after_readme / "runs/mine/ppo")
            printed = check_runs(command, after_readme, **small_machine)
            if "resume=true" in command:
                step = 40 if continues else 50
                assert f"resuming from runs/mine/ppo/checkpoint-{step}" in printed
    for run_name in ("two", "lora", "questions"):
        assert (after_readme / f"runs/{run_name}/sft/final/model.safetensors").is_file()


def test_every_page_with_commands_is_run():
    with_commands = {page.stem for page in DOCS if commands(page)}
    # test_journeys.py, tests/rank/test_browser.py, tests/commands/test_self_instruct.py
    elsewhere = {"journeys", "ranking", "generating-data"}
    assert with_commands == {*TRAINING_PAGES, *elsewhere}


def test_the_code_on_extending_runs():
    code = dict(blocks(ROOT / "docs/extending.md", "python"))
    files = ["my_scorer.py", "my_exact_scorer.py", "my_format.py"]
    assert list(code) == [*files, "estimator", "formulas"]
    space: dict = {}
    for text in code.values():
        exec(text, space)
    assert space["brevity"](["Hi"], ["a b c"]) == [0.25]
    assert space["exact"](["It is 5", "4"], ["5", "5"]) == [1.0, 0.0]
    check_row(space["questions"]({"question": "Name a fruit.", "answer": "An apple."}), "sft")

    class Rollout:
        response_mask = torch.tensor([[True, True], [True, False]])

    advantages, returns = space["reinforce"](Rollout, torch.tensor([[0.0, 3.0], [1.0, 0.0]]), None)
    assert advantages.tolist() == [[1.0, 1.0], [-1.0, 0.0]]
    assert returns.tolist() == [[3.0, 3.0], [1.0, 0.0]]
    torch.testing.assert_close(space["advantages"], torch.tensor([[0.95**2, 0.95, 1.0, 0.0]]))


def test_every_make_target_of_a_page_exists():
    targets = {
        t for page in PAGES for t in re.findall(r"(?:`|    )make ([a-z-]+)", page.read_text())
    }
    assert {"demo", "test", "lint", "test-slow", "docs"} <= targets
    for target in targets:
        assert run(["make", "-n", target], ROOT).returncode == 0, target


# --- Rows and names -------------------------------------------------------------------------------


def rows_on_the_data_page() -> dict[str, list[dict]]:
    """Format -> the rows shown below its heading."""
    sections = re.findall(
        r"^### `(\w+)`\n(.*?)(?=^#|\Z)",
        (ROOT / "docs/data.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    return {
        name: [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        for name, text in sections
    }


def test_the_data_page_shows_every_format():
    assert set(rows_on_the_data_page()) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_reads_the_rows_that_the_data_page_shows(name):
    rows = rows_on_the_data_page()[name]
    assert rows
    for row in rows:
        canonical = FORMATS[name](row)
        for one in canonical if isinstance(canonical, list) else [canonical]:
            assert one.keys() & {"messages", "prompt", "text"}


def test_the_readmes_rows_are_those_of_the_three_stages():
    for row, name, stage in zip(
        readme_rows(),
        ("messages", "ranked", "prompt_completion"),
        ("sft", "reward", "ppo"),
        strict=True,
    ):
        check_row(FORMATS[name](row), stage)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_tests_and_links_of_a_page_exist(page):
    text = page.read_text()
    for path in re.findall(r"`((?:rlhf|conf|examples|tests|docs)/[\w/.-]*\w)/?`", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", text):
        assert (page.parent / link).exists(), link
    defined = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in defined, name


@pytest.mark.parametrize("page", sorted({*PAGES} - BAD_INPUT), ids=lambda page: page.name)
def test_settings_named_in_a_page_exist(page):
    """Overrides in the text, such as `ppo.kl_coef=0.05`."""
    from rlhf.config import STAGES, config_keys

    known = {key for stage in STAGES.values() for key in config_keys(stage)}
    groups = {key.partition(".")[0] for key in known if "." in key} - {"trainer"}
    for key in re.findall(rf"[` ]((?:{'|'.join(groups)})\.[a-z_]+)[=`]", page.read_text()):
        assert key in known or key.endswith((".jsonl", ".py")), key


def test_the_documentation_lists_every_page():
    listed = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed[1:] if listed[0] == "docs" else listed) == [page.name for page in DOCS]
