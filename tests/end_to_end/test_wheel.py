"""The wheel, used the way a stranger uses it: from a folder unrelated to the checkout.

Builds the sdist and, from it, the wheel; unzips the wheel and runs the three commands against that
copy. Leaves out what the commands do once they train. Run: make wheel
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow  # `make wheel` runs them


def run_python(*args: str, cwd: Path, pythonpath: Path, silent: bool = False) -> str:
    """Run the interpreter in `cwd` with `pythonpath` first on sys.path; return its stdout."""
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(pythonpath), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{args} failed in {cwd}\n{done.stdout}\n{done.stderr}"
    assert not (silent and done.stderr), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in RLHF_WHEEL_DIR (set by `make wheel`), or one built here through the sdist."""
    given = os.environ.get("RLHF_WHEEL_DIR")
    folder = Path(given).resolve() if given else tmp_path_factory.mktemp("dist")
    if not given:
        build = ["-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
        done = subprocess.run([sys.executable, *build], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files_under(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix() for path in files}


def test_wheel_holds_the_package_and_the_configuration_and_nothing_else(installed: Path):
    assert {path.name.split("-")[0] for path in installed.iterdir()} == {"rlhf"}
    configuration = {f"conf/{name}" for name in files_under(ROOT / "conf")}
    assert configuration
    assert files_under(installed / "rlhf") == files_under(ROOT / "rlhf") | configuration


def test_unzipped_wheel_is_the_copy_under_test(installed: Path, tmp_path: Path):
    probe = "import rlhf, rlhf.config; print(rlhf.__file__); print(rlhf.config.CONF_DIR)"
    module, conf = run_python("-c", probe, cwd=tmp_path, pythonpath=installed).split()
    assert Path(module) == installed / "rlhf" / "__init__.py"
    assert Path(conf) == installed / "rlhf" / "conf"


def test_importing_the_package_imports_nothing_heavy(installed: Path, tmp_path: Path):
    probe = "import rlhf, sys; print({'torch', 'transformers', 'trl', 'hydra'} & set(sys.modules))"
    assert run_python("-c", probe, cwd=tmp_path, pythonpath=installed).strip() == "set()"


def test_every_public_name_can_be_imported_and_no_library_says_a_word(
    installed: Path, tmp_path: Path
):
    probe = "import rlhf; print(*[name for name in dir(rlhf) if getattr(rlhf, name) is not None])"
    printed = run_python("-c", probe, cwd=tmp_path, pythonpath=installed, silent=True)
    (line,) = printed.splitlines()
    names = line.split()
    assert {"PPOTrainer", "PPOConfig", "InputError", "load_scorer", "train_sft"} <= set(names)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_command_prints_its_config_from_an_empty_folder(
    stage: str, installed: Path, tmp_path: Path
):
    printed = run_python("-m", f"rlhf.{stage}", "--cfg", "job", cwd=tmp_path, pythonpath=installed)
    assert "run_name:" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_users_own_config_dir_adds_recipes_and_datasets(
    stage: str, installed: Path, tmp_path: Path
):
    own = tmp_path / "own"
    for name, text in {
        "recipe/mine.yaml": "# @package _global_\nseed: 7\n",
        "dataset/mine.yaml": "path: rows.jsonl\nformat: alpaca\n",
    }.items():
        (own / name).parent.mkdir(parents=True)
        (own / name).write_text(text)
    empty = tmp_path / "empty"
    empty.mkdir()
    overrides = ["--config-dir", str(own), "recipe=mine", "dataset=mine"]
    printed = run_python(
        "-m", f"rlhf.{stage}", "--cfg", "job", *overrides, cwd=empty, pythonpath=installed
    )
    assert "seed: 7" in printed.splitlines()
    assert "path: rows.jsonl" in printed
    assert list(empty.iterdir()) == []
