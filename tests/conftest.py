"""Settings of all tests: one thread per process, as models are tiny and some tests start two."""

import functools
import gc
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
    """Each call of the demo's rows gets an own copy of the first that one call generated: a stage
    checks all of them, and trains on few."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("rlhf.demo"):  # not in the copies of test_mutants.py
            from rlhf.demo import world

            original, most = world.rows, 512
            generate = functools.cache(lambda *key: pickle.dumps(original(*key)[:most]))
            patch.setattr(world, "rows", lambda *key: pickle.loads(generate(*key)))
        yield


@pytest.fixture(scope="session", autouse=True)
def hydra_composes_once():
    """Hydra composes every configuration twice, first to ask it for `hydra.mode`, which is null."""
    if not find_spec("hydra"):  # not in what tests/peers needs
        yield
        return
    from hydra._internal.hydra import Hydra

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "get_mode", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def no_search_for_garbage_in_what_stays():
    """A Trainer collects garbage several times: half a second each over torch and all tests."""
    gc.set_threshold(20_000, 20, 20)
    gc.collect()
    gc.freeze()


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
