"""Processes of benchmarks: `run_all` runs benchmarks one after the other and puts them into one
table; a `Worker` is one side of a benchmark, and measures when it is asked to.

A benchmark prints JSON as its last line; `headline` there is its cell of the table. One that fails
or takes too long does not stop the others. `gpu_check` and `make bench` use this.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Result = dict[str, Any]
CPU = "cpu_seconds_of_part"
ANSWER = "answer "  # begins each line of a worker that is for its parent


class Worker:
    """A process that answers, one line of JSON at a time, each time that it is asked."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]):
        self.name, self.errors = name, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def read(self) -> Any:
        """Its next answer, past what libraries print."""
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        self.errors.seek(0)
        raise SystemExit(f"{self.name} failed:\n{self.errors.read()[-3000:]}")

    def ask(self) -> Any:
        """Ask for the next measurement."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> Any:
        """Its last answer."""
        self.process.stdin.close()
        last = self.read()
        self.process.wait()
        return last


def answer(value: Any) -> None:
    """Tell the parent of this worker something."""
    print(ANSWER + json.dumps(value), flush=True)


def run_part(
    name: str, command: list[str], out: Path, environment: dict[str, str], limit: float
) -> Result:
    """Run one part: the JSON of its last line, with `status` and `seconds`.

    Args:
        environment: added to that of this process.
        limit: seconds.
    """
    log = out / f"{name}.log"
    began, worked = time.perf_counter(), _cpu_seconds()
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            cwd=out,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"} | environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
            problem = f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            problem = f"not done after {limit:.0f} s"
        finally:  # its workers too, or the next part shares the machine with them
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result: Result = {"status": "ok", "seconds": time.perf_counter() - began}
    result[CPU] = _cpu_seconds() - worked
    lines = log.read_text(errors="replace").strip().splitlines()
    found = [line for line in lines if line.startswith("{") and line.endswith("}")]
    if problem is not None:
        text = f"{problem}: {' / '.join(lines[-3:])[-400:]}"
        return result | {"status": "failed", "headline": text}
    if found:
        result |= {k: v for k, v in json.loads(found[-1]).items() if k != "seconds"}
    return result


def _cpu_seconds() -> float:
    """Of all processes that have ended so far and whose parents waited for them."""
    times = os.times()
    return times.children_user + times.children_system


def run_all(names: list[str], run: Callable[[str], Result], out: Path) -> int:
    """Run parts, write `<part>.json` after each and `table.md` at the end; 1 if one failed."""
    results = {}
    for name in names:
        print(f"== {name}", flush=True)
        results[name] = run(name)
        (out / f"{name}.json").write_text(json.dumps(results[name], indent=2))
        print(f"   {results[name]['status']}, {results[name]['seconds']:.0f} s", flush=True)
    lines = ["| part | status | seconds | result |", "|---|---|---|---|"]
    for name, result in results.items():
        cells = [name, result["status"], f"{result['seconds']:.0f}", result.get("headline", "")]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    (out / "table.md").write_text(text + "\n")
    wall, cpu = (sum(r.get(n, 0) for r in results.values()) for n in ("seconds", CPU))
    print(f"\n{text}\n\n{wall:,.0f} s, {cpu:,.0f} CPU seconds; files: {out}")
    return int(any(result["status"] == "failed" for result in results.values()))
