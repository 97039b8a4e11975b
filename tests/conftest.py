"""Settings of all tests: one thread per process, as models are tiny and some tests start two."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory):
    """Directory of the tiny random policy of `tiny_ppo`."""
    from tiny_ppo import write_policy

    return write_policy(tmp_path_factory.mktemp("policy"))
