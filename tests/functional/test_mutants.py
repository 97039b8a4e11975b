"""Plant bugs in the formulas, one at a time: each must make a test of rlhf.functional fail.

A mutant is the source of one module with one passage replaced; `mutants.txt` lists them. A process
that has torch imported takes a copy of the package with that module and runs the
tests: those of the module first. Only a failed test counts: a mutant that cannot be imported, or
that fails by an unknown name, is an error of the list.

Run: pytest -m slow tests/functional/test_mutants.py    (needs fork; prints what killed each)
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.processes import FORKS

TESTS = Path(__file__).parent
PACKAGE = TESTS.parents[1] / "rlhf"
MODULES = sorted(path.stem for path in (PACKAGE / "functional").glob("[!_]*.py"))

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="needs fork"
)


class Mutant(NamedTuple):
    name: str  # module and what is wrong
    module: str
    old: str
    new: str


class Outcome(NamedTuple):
    status: int  # pytest's exit status: 0 all passed, 1 a test failed
    failed: str  # the first failed test
    error: str  # the type of its exception
    output: str


def read_mutants(text):
    """Read paragraphs: `module: bug`, source lines after `- `, what replaces them after `+ `."""
    mutants = []
    for paragraph in text.strip().split("\n\n"):
        name, *lines = paragraph.split("\n")
        old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
        mutants.append(Mutant(name, name.partition(":")[0], old, new))
    return mutants


MUTANTS = read_mutants((TESTS / "mutants.txt").read_text(encoding="utf-8"))
PARAMETERS = [pytest.param(mutant, id=mutant.name) for mutant in MUTANTS]
pytestmark = pytest.mark.slow


class FirstFailure:
    """A pytest plugin that notes the first failed test and its exception."""

    name = error = ""

    def pytest_exception_interact(self, node, call):
        self.name, self.error = self.name or node.name, self.error or call.excinfo.typename


def run_tests(directory, module, old, new):
    """Run the tests of rlhf.functional, those of `module` first, against a mutated copy of it.

    Runs in a process of its own.
    """
    import hypothesis

    functional = Path(directory) / "rlhf" / "functional"
    shutil.copytree(PACKAGE / "functional", functional, ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(PACKAGE / "__init__.py", functional.parent)
    source = functional / f"{module}.py"
    source.write_text(source.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    sys.path.insert(0, str(directory))
    for name in [name for name in sys.modules if name.partition(".")[0] == "rlhf"]:
        del sys.modules[name]
    imported = importlib.import_module("rlhf.functional")  # a mutant must be importable
    assert Path(imported.__file__).parent == functional, "the copy is what is tested"

    # A smaller counterexample, or why it is one, is of no use here.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", phases=phases)
    hypothesis.settings.load_profile("mutants")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # importing plugins takes a second
    gc.freeze()  # pytest collects garbage, and should not search all of torch for it
    options = ["-x", "-q", "--tb=short", "--assert=plain", "-p", "no:cacheprovider"]
    files = sorted(set(TESTS.glob("test_*.py")) - {Path(__file__)})
    own = [path for path in files if path.name == f"test_{module}.py"]
    for selected in (own, [path for path in files if path not in own]):
        first = FirstFailure()
        with contextlib.redirect_stdout(io.StringIO()) as output:
            status = pytest.main([*options, *map(str, selected)], plugins=[first])
        if status != pytest.ExitCode.OK:
            break
    return Outcome(int(status), first.name, first.error, output.getvalue())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, request):
    """Start the selected mutants, two at a time; return their results to wait for, by name."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    selected = [p.params["mutant"] for p in parameters if p and "mutant" in p.params]
    with FORKS.Pool(2, maxtasksperchild=1) as pool:
        runs = {"control": ("tokens", "", "")}
        runs |= {mutant.name: (mutant.module, mutant.old, mutant.new) for mutant in selected}
        yield {
            name: pool.apply_async(run_tests, (tmp_path_factory.mktemp("mutant"), *run))
            for name, run in runs.items()
        }


def test_at_least_forty_mutants_cover_every_module_and_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
    assert {mutant.module for mutant in MUTANTS} == set(MODULES)


def test_what_a_mutant_replaces_occurs_exactly_once():
    for mutant in MUTANTS:
        source = (PACKAGE / "functional" / f"{mutant.module}.py").read_text(encoding="utf-8")
        assert source.count(mutant.old) == 1, mutant
        assert mutant.new != mutant.old, mutant


def test_without_a_mutant_every_test_passes(outcomes):
    outcome = outcomes["control"].get(timeout=600)
    assert outcome.status == pytest.ExitCode.OK, outcome.output


@pytest.mark.parametrize("mutant", PARAMETERS)
def test_a_planted_bug_makes_a_test_fail(mutant, outcomes):
    outcome = outcomes[mutant.name].get(timeout=600)
    assert outcome.status != pytest.ExitCode.OK, f"survived: {mutant.name}; a test is missing"
    assert outcome.status == pytest.ExitCode.TESTS_FAILED, outcome.output
    assert outcome.error not in ("NameError", "UnboundLocalError", "ImportError"), outcome.output


def test_the_list_of_mutants_is_printed(outcomes, capsys):
    killed = 0
    lines = []
    for mutant in MUTANTS:
        outcome = outcomes[mutant.name].get(timeout=600)
        killed += outcome.status == pytest.ExitCode.TESTS_FAILED
        fate = f"killed by {outcome.failed}" if outcome.failed else "SURVIVED"
        lines.append(f"{mutant.name}: {fate}")
    with capsys.disabled():
        print("\n\n" + "\n".join(lines))
        print(f"{killed} of {len(MUTANTS)} mutants killed")
