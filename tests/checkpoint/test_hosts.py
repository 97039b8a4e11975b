"""Two processes whose folders are on different disks, as on two hosts without a shared file system.

Run: python -m pytest tests/checkpoint/test_hosts.py
"""

import os
from pathlib import Path

from accelerate import PartialState
from helpers.sharded import in_group, text_of

from rlhf.checkpoint import collect_from_hosts, copy_to_all_hosts, hosts

FILES = {"final/model.safetensors": b"x" * 25, "config.yaml": b"seed: 1\n", "empty": b""}
CHECKPOINT = {"checkpoint-2/model.safetensors": b"new", "checkpoint-2/manifest.json": b"of new"}
OLDER = {"checkpoint-2/model.safetensors": b"old", "checkpoint-2/manifest.json": b"of old"}


def tree(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def exchange(folder: Path, place: str = "runs") -> None:
    os.environ["LOCAL_RANK"] = "0"
    rank = PartialState(cpu=True).process_index
    hosts.CHUNK = 10
    os.chdir(folder / f"host-{rank}")
    copy_to_all_hosts(Path(place))
    Path("runs", f"sums_{rank}.json").write_text(f"of {rank}")
    collect_from_hosts(Path("runs"))


def test_hosts_get_what_the_first_has_and_it_collects_what_they_wrote(tmp_path):
    for host, given in (("host-0", FILES | CHECKPOINT), ("host-1", OLDER)):
        for name, content in given.items():
            file = tmp_path / host / "runs" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    (tmp_path / "host-0/runs/.lock").touch()
    (tmp_path / "host-1/runs/config.yaml").write_bytes(FILES["config.yaml"])
    log = tmp_path / "log"
    codes = in_group(exchange, tmp_path, log=log, shards=False)
    assert codes == [0, 0], text_of(log)
    all_of = FILES | CHECKPOINT | {"sums_1.json": b"of 1"}
    assert tree(tmp_path / "host-1/runs") == all_of
    assert tree(tmp_path / "host-0/runs") == all_of | {".lock": b"", "sums_0.json": b"of 0"}
    assert "runs is not on all hosts: sending 4 files to the others" in text_of(log)


def test_a_checkpoint_of_an_earlier_run_is_replaced(tmp_path):
    for host, given in (("host-0", CHECKPOINT), ("host-1", OLDER)):
        for name, content in given.items():
            file = tmp_path / host / "runs" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    log = tmp_path / "log"
    codes = in_group(exchange, tmp_path, "runs/checkpoint-2", log=log, shards=False)
    assert codes == [0, 0], text_of(log)
    assert tree(tmp_path / "host-1/runs") == CHECKPOINT | {"sums_1.json": b"of 1"}


def test_one_process_copies_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    copy_to_all_hosts(tmp_path)
    collect_from_hosts(tmp_path)
