"""The shape of the package, read from its sources: imports run one way, files and functions are
short, no module hides another package, no two files of different jobs share a name.

Run: python -m pytest tests/test_architecture.py
"""

import ast
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "rlhf").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# From the ground up. A module imports only from floors below its own; every module has a floor.
FLOORS = [
    {"functional", "config"},
    {"console", "gguf_files", "slurm", "sqlite_files"},
    {"trackers", "launched"},
    {"option_parser", "overrides", "next_commands", "metrics", "hub", "http_endpoint", "rubrics"},
    {"curves", "vllm_server", "zero", "cpu_adam"},
    {"tokenizer", "distributed", "failures"},
    {"slices", "sharding_settings"},
    {"data", "checkpoint"},
    {"models", "row_file", "inputs"},
    {"cli", "sampling"},
    {"equivalence"},
    {"engine_choice"},
    {"policy", "web"},
    {"scorers"},
    {"hf_trainer", "score"},
    {"sft", "reward", "ppo"},
    {"chat", "generate", "export", "compare", "pipeline", "plan"},
    {"rank", "report", "diagnose"},
    {"evaluate"},
    {"demo"},
    {"demo_world"},
    {"__init__"},
]
FLOOR = {module: number for number, floor in enumerate(FLOORS) for module in floor}


SAME_JOB = {  # files of these names do one job, each for its stage or command
    "__init__.py",
    "__main__.py",
    "stage.py",
    "options.py",
    "serving.py",
}


def module_of(path):
    """First name below `rlhf`: a package such as `rlhf/data/` counts as one module."""
    return path.relative_to(ROOT / "rlhf").parts[0].removesuffix(".py")


def imported(tree):
    """Modules of ours that a file imports, at the top or inside a function."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("rlhf.")}


def test_imports_are_found_at_the_top_and_inside_functions():
    source = (
        "import rlhf.models\nfrom rlhf import data\ndef f():\n    from rlhf.ppo.stage import x\n"
    )
    assert imported(ast.parse(source)) == {"models", "data", "ppo"}


def test_every_module_has_a_floor():
    assert {module_of(path) for path in FILES} == set(FLOOR)


def test_files_of_different_jobs_have_different_names():
    names = Counter(path.name for path in FILES)
    assert {name for name, number in names.items() if number > 1} <= SAME_JOB


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    module = module_of(path)
    others = imported(TREES[path]) - {module}
    upwards = {other for other in others if FLOOR.get(other, 0) >= FLOOR[module]}
    assert not upwards, f"{module} imports from its own floor or above"


def test_no_module_hides_the_standard_library_or_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = {re.split("[<>=]", name)[0] for name in project["dependencies"]}
    modules = {module_of(path) for path in FILES} | {path.stem for path in FILES}
    taken = set(sys.stdlib_module_names) | dependencies | {"hydra", "yaml", "wandb", "tokenizers"}
    assert not (modules - {"__init__", "__main__"}) & taken


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= 400, f"{path.name} has {num_lines} lines"
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = node.end_lineno - node.lineno + 1
            assert num_lines <= 50, f"{node.name} has {num_lines} lines"


def test_test_files_are_short():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "tests").rglob("*.py")
    }
    assert {name: n for name, n in lengths.items() if n > 500} == {}
