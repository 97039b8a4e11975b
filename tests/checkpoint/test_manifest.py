"""Checkpoints are complete only with an intact manifest, which finds any damage.

Run: python -m pytest tests/checkpoint/test_manifest.py
"""

import os

from helpers.checkpoints import make_checkpoint, names

from rlhf.checkpoint import find_damage, read_manifest
from rlhf.checkpoint.disk import write_manifest
from rlhf.checkpoint.ownership import complete_checkpoints, latest_checkpoint


def test_latest_checkpoint_counts_numerically_and_ignores_incomplete_ones(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (9, 10):
        make_checkpoint(tmp_path, step)
    for name in ("checkpoint-11", "checkpoint-12.tmp", "final", "checkpoint-best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11" / "manifest.json").write_text("{")
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-9", tmp_path / "checkpoint-10"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_manifest_holds_size_and_hash_of_every_file(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    write_manifest(tmp_path, {"fact": 1})
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert read_manifest(tmp_path) == {
        "fact": 1,
        "files": {"b": {"size": 0, "sha256": nothing}, "inner/a": {"size": 3, "sha256": sha256}},
    }
    assert find_damage(tmp_path) is None


def test_one_flipped_bit_anywhere_in_a_checkpoint_is_found(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 1)
    for name in names(checkpoint):
        file = checkpoint / name
        content = file.read_bytes()
        step = max(1, len(content) // 50)
        for position in range(0, len(content), step):
            damaged = bytearray(content)
            damaged[position] ^= 1
            file.write_bytes(damaged)
            assert name in (find_damage(checkpoint) or ""), (name, position)
        file.write_bytes(content)
    assert find_damage(checkpoint) is None


def test_missing_and_truncated_files_are_named(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 1)
    file = checkpoint / "policy.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 3)
    assert find_damage(checkpoint) == f"policy.safetensors has {size - 3} bytes instead of {size}"
    assert find_damage(checkpoint, ["config.yaml"]) is None
    file.unlink()
    assert find_damage(checkpoint) == "policy.safetensors is missing"
    (checkpoint / "manifest.json").unlink()
    assert find_damage(checkpoint) == "manifest.json is missing: its writing was cut off"
