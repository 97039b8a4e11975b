"""Signals in this process: the flag, the grace time, the handlers.

Run: python -m pytest tests/checkpoint/test_interruption.py
"""

import os
import signal
import time

import pytest
from helpers.checkpoints import make_checkpoint

from rlhf.checkpoint import GracefulStop, complete_or_nothing
from rlhf.checkpoint.ownership import complete_checkpoints

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


@pytest.mark.parametrize("number, name", [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_first_signal_asks_to_stop_and_ctrl_c_then_stops(number, name, tmp_path, capfd):
    before = [signal.getsignal(s) for s in SIGNALS]
    with GracefulStop(60, tmp_path) as stop:
        assert not stop.requested() and stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.requested() and stop.signal == number
        text = f"\n{name}: finishing this step, then saving a checkpoint, for at most 60 seconds"
        assert text in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)  # some send it again and again
        assert stop.signal == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_block_that_outlasts_the_grace_time_is_left(number, status, tmp_path, capfd):
    make_checkpoint(tmp_path, 7)
    with pytest.raises(SystemExit) as stop, GracefulStop(0.05, tmp_path):
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert stop.value.code == status
    said = f"exiting without saving; {tmp_path / 'checkpoint-7'} remains"
    assert said in capfd.readouterr().err
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_save_that_outlasts_the_grace_time_leaves_no_checkpoint(tmp_path, capfd):
    with pytest.raises(SystemExit), GracefulStop(0.05, tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
        with complete_or_nothing(tmp_path / "checkpoint-1"):
            time.sleep(10)
    assert "there is no checkpoint" in capfd.readouterr().err
    assert complete_checkpoints(tmp_path) == []


def test_handlers_are_restored_after_an_error(tmp_path):
    before = [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(RuntimeError), GracefulStop(60, tmp_path):
        raise RuntimeError
    assert [signal.getsignal(s) for s in SIGNALS] == before
