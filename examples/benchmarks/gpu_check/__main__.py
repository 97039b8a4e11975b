"""What only a GPU can show, in parts of at most four minutes: `make gpu-check`.

Each part runs in a process of its own and writes `OUT/<part>.json` as soon as it ends. A part that
fails or takes too long does not stop the others. A table of all parts ends the run and is written
to `OUT/table.md`. The exit status is 1 where a part failed.

    tests    the tests marked gpu            demo     the demo world through the three stages
    ppo      PPO of a 1.2 B Llama            trl      the same with TRL 1.12.0, the last with PPO
    lora7b   PPO with LoRA at 7 B            sft1b, sft7b   full fine-tuning with the SFT stage

The machine's own Python, torch and transformers are used. What else is needed is installed from
the wheels of a folder, without a network; `make gpu-wheels` fills the folder. `--dry` runs every
part at tiny size on a CPU. Left out: several GPUs.

Run: python examples/benchmarks/gpu_check --parts tests,ppo --wheels wheels --out gpu_check
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PARTS = ("tests", "demo", "ppo", "trl", "lora7b", "sft1b", "sft7b")
LIMIT = 240  # seconds of a part
PHASES = ("rollout", "scoring", "optimise", "step")
OLD_TRL = "trl-1.12.0"


def main() -> int:
    """Run the parts one after the other and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--wheels", type=Path, default=Path("wheels"))
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts={options.parts}: {', '.join(sorted(unknown))} is none of {PARTS}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    paths = install(options.wheels, out)
    results = {}
    for part in parts:
        print(f"== {part}", flush=True)
        results[part] = run_part(part, out, paths, options.dry)
        (out / f"{part}.json").write_text(json.dumps(results[part], indent=2))
        print(f"   {results[part]['status']}, {results[part]['seconds']:.0f} s", flush=True)
    text = table(results)
    (out / "table.md").write_text(text)
    print(f"\n{text}\nfiles: {out}")
    return int(any(result["status"] == "failed" for result in results.values()))


def install(wheels: Path, out: Path) -> dict[str, str]:
    """Unpack the wheels of a folder next to the machine's own packages.

    Returns:
        PYTHONPATH of the parts under "new", and under "old" that of the part with TRL 1.12.0.
    """
    files = sorted(wheels.resolve().glob("*.whl")) if wheels.is_dir() else []
    groups = {
        "site": [f for f in files if not f.name.startswith(OLD_TRL)],
        "site_trl": [f for f in files if f.name.startswith(OLD_TRL)],
    }
    for name, group in groups.items():
        if group:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
            command += ["--no-compile", "--upgrade", "--target", str(out / name), *map(str, group)]
            subprocess.run(command, check=True)
    new = os.pathsep.join([str(ROOT), str(out / "site")])
    return {"new": new, "old": os.pathsep.join([str(out / "site_trl"), new])}


def run_part(part: str, out: Path, paths: dict[str, str], dry: bool) -> dict[str, Any]:
    """Run one part in a process of its own: its figures, with `status` and `seconds`."""
    figures, log = out / f"{part}.figures.json", out / f"{part}.log"
    figures.unlink(missing_ok=True)
    if part == "trl" and not (out / "site_trl").is_dir():
        reason = f"no wheel of {OLD_TRL} in the folder of wheels; make gpu-wheels fetches it"
        return {"status": "skipped", "seconds": 0.0, "reason": reason}
    environment = os.environ | {"PYTHONPATH": paths["old" if part == "trl" else "new"]}
    environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    began = time.perf_counter()
    with log.open("w") as stream:
        try:
            command = command_of(part, out, figures, dry)
            done = subprocess.run(
                command, cwd=out, env=environment, stdout=stream, stderr=stream, timeout=LIMIT
            )
            problem = f"exit status {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            problem = f"not done after {LIMIT} s"
    result: dict[str, Any] = {"status": "ok", "seconds": time.perf_counter() - began}
    if figures.is_file():
        result |= json.loads(figures.read_text())
        figures.unlink()
    if problem is not None:
        last = log.read_text(errors="replace").strip().splitlines()[-3:]
        result |= {"status": "failed", "reason": f"{problem}: {' / '.join(last)[-400:]}"}
    return result


def command_of(part: str, out: Path, figures: Path, dry: bool) -> list[str]:
    """The command of a part."""
    python = [sys.executable]
    if part == "tests":  # in a dry run those of them that run on a CPU too
        marks = ["-k", "cpu", "-m", ""] if dry else ["-m", "gpu"]
        options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c"]
        options += [str(ROOT / "pyproject.toml"), *marks]
        return [*python, "-m", "pytest", *options, str(ROOT / "tests/gpu")]
    script = {"demo": "demo.py", "trl": "trl_ppo.py", "sft1b": "sft.py", "sft7b": "sft.py"}
    size = "dry" if dry else {"lora7b": "7b", "sft1b": "1b", "sft7b": "7b"}.get(part, "1.2b")
    lora = ["--lora"] if part == "lora7b" else []
    return [*python, str(HERE / script.get(part, "ppo.py")), "--size", size, *lora, str(figures)]


def table(results: dict[str, dict[str, Any]]) -> str:
    """The figures of all parts as a Markdown table."""
    names = ("part", "status", "seconds", *(f"{p}, s" for p in PHASES), "tokens/s", "peak GiB")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for part, result in results.items():
        phases = result.get("phases", {})
        numbers = [f"{phases[p]:.3g}" if p in phases else "" for p in PHASES]
        for name, form in (("tokens_per_second", ",.0f"), ("peak_gib", ".1f")):
            numbers.append(format(result[name], form) if name in result else "")
        cells = [part, result["status"], f"{result['seconds']:.0f}", *numbers]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"{part}: {r['reason']}" for part, r in results.items() if "reason" in r]
    return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in notes)


if __name__ == "__main__":
    raise SystemExit(main())
