"""What only a GPU can show, in parts of at most four minutes: `make gpu-check`.

Each part runs in a process of its own and writes `OUT/<part>.json` as soon as it ends. A part that
fails or takes too long does not stop the others. A table of all parts ends the run and is written
to `OUT/table.md`. The exit status is 1 where a part failed.

    tests    the tests marked gpu            demo     the demo world through the three stages
    ppo      PPO of a 1.2 B Llama            trl      the same with TRL 1.12.0, the last with PPO
    lora7b   PPO with LoRA at 7 B            decode   time per token against the card's limit
    memory7b   peak of PPO with LoRA at 7 B against the preflight's estimate
    sft1b, sft7b   full fine-tuning with the SFT stage, without padding; 1 B also padded and packed

The machine's own Python, torch and transformers are used. What else is needed is installed from
the wheels of a folder, without a network; `make gpu-wheels` fills the folder. `--dry` runs every
part at tiny size on a CPU. Left out: several GPUs.

Run: python examples/benchmarks/gpu_check --parts tests,ppo --wheels wheels --out gpu_check
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from parts import run_all, run_part  # noqa: E402

ROOT = HERE.parents[2]
PARTS = ("tests", "demo", "ppo", "trl", "lora7b", "decode", "memory7b", "sft1b", "sft7b")
LIMIT = 240  # seconds of a part
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
    path = install(options.wheels, out)

    def run(part: str) -> dict[str, Any]:
        if part == "trl" and not (out / "site_trl").is_dir():
            reason = f"no wheel of {OLD_TRL} in the folder of wheels; make gpu-wheels fetches it"
            return {"status": "skipped", "seconds": 0.0, "headline": reason}
        environment = {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "0"}
        return run_part(part, command_of(part, out, options.dry), out, environment, LIMIT)

    return run_all(parts, run, out)


def install(wheels: Path, out: Path) -> str:
    """Unpack the wheels of a folder next to the machine's own packages; TRL 1.12.0 has a folder of
    its own, `site_trl`. Return PYTHONPATH of the parts."""
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
    return os.pathsep.join([str(ROOT), str(HERE.parent), str(out / "site")])


def command_of(part: str, out: Path, dry: bool) -> list[str]:
    """The command of a part."""
    if part == "tests":  # in a dry run those of them that run on a CPU too
        marks = ["-k", "cpu", "-m", ""] if dry else ["-m", "gpu"]
        options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c"]
        options += [str(ROOT / "pyproject.toml"), *marks]
        return [sys.executable, "-m", "pytest", *options, str(ROOT / "tests/gpu")]
    if part == "demo":
        return [sys.executable, str(HERE / "demo.py"), *(["--dry"] if dry else [])]
    if part.startswith("sft"):
        preset = "tiny" if dry else part.removeprefix("sft")
        sizes = ["--rounds", "1"]
        if dry:
            sizes += ["--ways", "padded", "--batch", "2", "--steps", "4"]
        elif part == "sft7b":
            sizes += ["--ways", "padding-free"]
        return [sys.executable, str(HERE.parent / "sft_throughput.py"), "--preset", preset, *sizes]
    if part == "decode":
        sizes = ["--preset", "tiny", "--rows", "2", "--tokens", "4"] if dry else ["--preset", "1b"]
        return [sys.executable, str(HERE.parent / "decode.py"), *sizes]
    if part == "memory7b":
        sizes = ["--batch", "8", "--limit", "8", "--cases", "peft.enabled=true"]
        preset = ["--preset", "tiny", *sizes] if dry else ["--preset", "7b-lora", "--batch", "64"]
        return [sys.executable, str(HERE.parent / "memory.py"), *preset]
    preset = "7b-lora" if part == "lora7b" else "1b"
    command = [sys.executable, str(HERE.parent / "ppo_step.py"), "--preset", preset]
    command += ["--updates", "3", "--sides", "trl" if part == "trl" else "ours"]
    if part == "trl":
        command += ["--trl-python", sys.executable, "--trl-path", str(out / "site_trl")]
    if dry:
        command += ["--preset", "tiny", "--batch", "8", "--limit", "8", "--updates", "2"]
        command += ["--set", "peft.enabled=true"] if part == "lora7b" else []
    return command


if __name__ == "__main__":
    raise SystemExit(main())
