"""The tutorial runs top to bottom, on tiny sizes and in full, with `-m slow`.

Run: python -m pytest tests/end_to_end/test_tutorial.py
"""

from __future__ import annotations

import json
import sys

import pytest
from helpers.commands import ROOT, run

NOTEBOOK = ROOT / "docs/tutorial.ipynb"


def cells(kind: str) -> list[dict]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in content if cell["cell_type"] == kind]


def run_notebook(folder, timeout: float = 300, **environment: str) -> str:
    """Run the code cells in order in one process; return what they print."""
    script = "\n\n".join("".join(cell["source"]) for cell in cells("code"))
    (folder / "tutorial.py").write_text(script, encoding="utf-8")
    result = run([sys.executable, "tutorial.py"], folder, timeout, MPLBACKEND="agg", **environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


def test_the_tutorial_is_stored_without_outputs():
    assert len(cells("code")) > 8
    for cell in cells("code"):
        assert not cell["outputs"] and cell["execution_count"] is None


@pytest.mark.slow
def test_the_tutorial_runs_on_tiny_sizes(tmp_path):
    printed = run_notebook(tmp_path, RLHF_TUTORIAL="tiny")
    assert "gold score:" in printed
    assert (tmp_path / "runs/tutorial-kl0/ppo/final/model.safetensors").is_file()


@pytest.mark.slow
def test_the_tutorial_shows_what_it_says(tmp_path):
    run_notebook(tmp_path, timeout=3600)
    gold, proxy = {}, {}
    for name in ("kl0.15", "kl0"):
        text = (tmp_path / f"runs/tutorial-{name}/ppo/metrics.jsonl").read_text()
        rows = [row for row in map(json.loads, text.splitlines()) if "eval_score" in row]
        gold[name] = [row["eval_independent_score"] for row in rows]
        proxy[name] = [row["eval_score"] for row in rows]
    assert gold["kl0.15"][-1] > gold["kl0.15"][0] + 0.1
    assert proxy["kl0"][-1] > proxy["kl0.15"][-1]
    assert gold["kl0"][-1] < gold["kl0"][0] < gold["kl0.15"][-1]
