"""Settings of all tests: one thread per process, as models are tiny and some tests start two."""

import functools
import os
import pickle
import signal
from importlib.util import find_spec

# A shell's background job and nohup have these ignored, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def no_pictures_of_stages():
    """A test that looks at a picture puts the function that draws it back."""
    # the copies of test_mutants.py hold the formulas alone, and so does what tests/peers needs
    if find_spec("rlhf.curves") and find_spec("omegaconf"):
        from helpers.commands import draw_no_pictures

        draw_no_pictures()


@pytest.fixture(scope="session", autouse=True)
def rows_of_the_demo_are_generated_once():
    """Each call of the demo's rows gets an own copy of those that the first call generated."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("rlhf.demo"):  # not in the copies of test_mutants.py
            from rlhf.demo import world

            generate = functools.cache(lambda stage, split: pickle.dumps(original(stage, split)))
            original = world.rows
            patch.setattr(world, "rows", lambda stage, split: pickle.loads(generate(stage, split)))
        yield


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory):
    """Directory of the tiny random policy of `tiny_ppo`."""
    from helpers.tiny_ppo import write_policy

    return write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def run_data(tmp_path_factory):
    """Folder with the data of the small runs of `helpers.runs`."""
    from helpers.runs import write_data

    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def wholes(tmp_path_factory, run_data):
    """Stage -> configuration, directory and `Whole` of a small run that was left alone."""
    from helpers.runs import uninterrupted_runs, write_random_policy

    policy = write_random_policy(tmp_path_factory.mktemp("policy"))
    return uninterrupted_runs(tmp_path_factory.mktemp("whole"), run_data, policy)
