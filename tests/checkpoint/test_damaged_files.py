"""A file of a run that is not UTF-8, not JSON or not YAML ends in one line with its name.

Run: python -m pytest tests/checkpoint/test_damaged_files.py
"""

import pytest

from rlhf.checkpoint import read_record
from rlhf.checkpoint.config_changes import STOPPED, read_settings, stopped_after
from rlhf.config import InputError, SFTStageConfig, load_config
from rlhf.reward.report.__main__ import ReportOptions, stage_config

DAMAGED = [b"\xff\xfe{", b"{", b"[" * 5000]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "rlhf.json").write_bytes(content)
    with pytest.raises(InputError, match=r"rlhf\.json is damaged"):
        read_record(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"{", b"[]", b'{"step": null}'])
def test_a_damaged_note_of_a_stop_is_named(tmp_path, content):
    (tmp_path / STOPPED).write_bytes(content)
    with pytest.raises(InputError, match=f"{STOPPED} is damaged .*delete it"):
        stopped_after(tmp_path, 0)


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"a: {b: ]"])
def test_a_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.yaml is damaged"):
        load_config(SFTStageConfig, tmp_path / "config.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"a: {b: ]"])
def test_a_damaged_configuration_of_a_reward_model_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.yaml is damaged"):
        stage_config(ReportOptions(str(tmp_path)))


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"a: {b: ]", b"[]", b"seed: 1"])
def test_a_damaged_configuration_of_a_finished_run_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.yaml is damaged"):
        read_settings(tmp_path)
