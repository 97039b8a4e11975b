"""The command `rlhf.chat` on tiny models: piped questions, wrong input, the terminal.

Run: python -m pytest tests/commands/test_chat_command.py
"""

from __future__ import annotations

import dataclasses
import io
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.chat_models import EOS, TOKENIZER, answer_of, chat_with, random_policy, scripted, write
from helpers.tiny import tiny_model

import rlhf.chat
from rlhf.chat import ChatOptions, printable, talk
from rlhf.config import ModelConfig
from rlhf.generate import GenerateOptions
from rlhf.models import init_reward_model
from rlhf.option_parser import run_command
from rlhf.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write(tmp_path_factory.mktemp("runs") / "random" / "sft" / "final", random_policy())


@pytest.fixture(scope="module")
def reward_model(policy, tmp_path_factory):
    config = ModelConfig(path=str(policy))
    directory = tmp_path_factory.mktemp("reward")
    return write(directory, init_reward_model(config, load_tokenizer(config), 0), "reward")


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capfd):
    """Run the command in this process with lines piped in: (exit status, stdout, stderr)."""

    def run(*arguments, lines=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        status = run_command(str(rlhf.chat.__doc__), ChatOptions, talk, list(arguments))
        return status, *capfd.readouterr()

    return run


def test_piped_questions_are_answered_in_turn_each_by_itself(policy, command, monkeypatch):
    path = os.path.relpath(policy, ROOT)
    monkeypatch.chdir(ROOT)
    arguments = (f"path={path}", "response_length=9", "seed=3")
    status, output, errors = command(*arguments, lines="Name a fruit.\n\nAnother.\n")
    chat = chat_with(policy, response_length=9, seed=3)
    expected = [answer_of(chat, "Name a fruit.", 0)]
    chat.reset()
    expected.append(answer_of(chat, "Another.", 2))
    assert (status, output) == (0, "".join(printable(a) + "\n" for a in expected))
    title, *rest = errors.splitlines()
    assert title.startswith(f"{path}: sft stage, LlamaForCausalLM, 41,120 parameters on ")
    assert all(line.startswith("[cut off: response_length=9") for line in rest)


def test_piped_questions_are_one_conversation_when_asked(policy, command):
    options = {"response_length": 9, "seed": 3}
    arguments = [f"path={policy}", *(f"{name}={value}" for name, value in options.items())]
    lines = "Name a fruit.\nAnother.\n"
    status, output, _ = command(*arguments, "one_conversation=true", lines=lines)
    chat = chat_with(policy, **options)
    expected = [answer_of(chat, "Name a fruit.", 0), answer_of(chat, "Another.", 1)]
    assert (status, output) == (0, "".join(printable(a) + "\n" for a in expected))
    assert command(*arguments, lines=lines)[1] != output


def test_compare_answers_with_both_models_and_a_history_each(command, tmp_path):
    paths = [tmp_path / name for name in ("one", "two")]
    for path, text in zip(paths, ("abc", "xyz"), strict=True):
        write(path, scripted(text + EOS), stage="ppo")
    status, output, errors = command(
        f"path={paths[0]}", f"compare={paths[1]}", "temperature=0", lines="Hi\n/undo\n/rest\nHo\n"
    )
    answers = f"--- {paths[0]}\nabc\n--- {paths[1]}\nxyz\n"
    assert (status, output) == (0, answers * 2)
    assert [line for line in errors.splitlines() if line.startswith("[")] == [
        "[0 rounds remembered]",
        "[unknown command /rest. Did you mean /reset or /exit?]",
    ]


def test_exit_leaves_and_a_cut_off_answer_is_remarked_on(command, tmp_path):
    path = write(tmp_path / "final", scripted("abc"))
    arguments = (f"path={path}", "temperature=0", "response_length=5")
    status, output, errors = command(*arguments, lines="Hi\n/exit\nHo\n")
    assert (status, output) == (0, "abcab\n")
    assert errors.endswith("\n[cut off: response_length=5, or the end of the context]\n")


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2J\x07\x9b\x7f") == "a\ufffd[2J\ufffd\ufffd\ufffd"
    harmless = "b\tc\né\u200d\u00a0"
    assert printable(harmless) == harmless


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            [],
            "path is missing; add path=<stage directory, other model directory or Hub id; several",
        ),
        (["runs/x"], "cannot read 'runs/x'; write key=value, e.g. path=runs/x"),
        (["path=x", "temprature=1"], "unknown option 'temprature'. Did you mean temperature or "),
        (["path=x", "seed=1.5"], "seed must be of type int, got '1.5'"),
        (["path=x", "temperature=warm"], "temperature must be of type float, got 'warm'"),
        (["path=x", "temperature=-1"], "temperature must be >= 0, got -1.0"),
        (["path=x", "top_p=0"], "top_p must lie in (0, 1], got 0.0"),
        (["path=x", "top_k=-1"], "top_k must be >= 0, got -1"),
        (["path=x", "response_length=0"], "response_length must be >= 1, got 0"),
        (["path=x", "seed=-1"], "seed must be >= 0, got -1"),
        (["path=./nowhere"], "path=./nowhere: no such directory"),
        (["path={policy}", "compare=/nowhere"], "compare=/nowhere: no such directory"),
        (
            ["path={run}"],
            "path={run} is not a model directory (no config.json); did you mean {policy}?",
        ),
        (["path={reward}"], "path={reward} was written by the reward stage, but a directory of"),
        (["path={policy}", "device=gpu"], "device=gpu cannot be used here ("),
        (["path={policy}", "chat_template=plane"], "chat_template='plane' is neither one of"),
        (["path={ppo}"], "path={ppo} is a PPO checkpoint; make a model directory from it with"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    arguments, message, command, policy, reward_model, tmp_path
):
    (tmp_path / "policy.safetensors").touch()
    places = {
        "policy": policy.resolve(),
        "run": policy.resolve().parents[1],
        "reward": reward_model,
        "ppo": tmp_path,
    }
    status, output, errors = command(*(a.format(**places) for a in arguments))
    (line,) = errors.splitlines()
    assert line.startswith(f"error: {message.format(**places)}")
    assert (status, output) == (2, "")


def test_system_message_has_no_place_without_a_conversation(command, tmp_path):
    path = write(tmp_path / "text", tiny_model("llama", TOKENIZER), prompts="text")
    status, _, errors = command(f"path={path}", "system=Be brief.")
    assert status == 2
    assert errors == (
        f"error: path={path} takes no system message: it was trained on text prompts; leave system "
        "out, or add chat_template=plain or chat_template=alpaca\n"
    )


@pytest.mark.parametrize("name, options", [("chat", ChatOptions), ("generate", GenerateOptions)])
def test_help_answers_without_importing_torch(tmp_path, name, options):
    probe = (
        f"import atexit, runpy, sys; sys.argv = ['rlhf.{name}', '--help']\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        f"runpy.run_module('rlhf.{name}', run_name='__main__', alter_sys=True)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "False\n")
    names = [field.name for field in dataclasses.fields(options)]
    assert all(f"\n    {name} " in done.stdout for name in names)


# --- At a terminal --------------------------------------------------------------------------------


class Terminal:
    """The command at a pseudo-terminal of its own, so that Ctrl-C is a signal to it alone."""

    def __init__(self, *arguments):
        import fcntl
        import pty
        import termios

        self.descriptor, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf.chat", *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"},
        )
        os.close(inner)

    def type(self, text):
        os.write(self.descriptor, text.encode())

    def read(self, until, timeout=300.0):
        text, end = "", time.monotonic() + timeout
        while until not in text:
            left = end - time.monotonic()
            assert left > 0 and select.select([self.descriptor], [], [], left)[0], text
            text += os.read(self.descriptor, 4096).decode(errors="replace")
        return text.replace("\r\n", "\n")

    def close(self):
        self.process.kill()  # nothing happens where it has ended
        self.process.wait()
        os.close(self.descriptor)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(tmp_path):
    model = scripted("abcdefghij", max_position_embeddings=100_000)  # which never stops
    path = write(tmp_path / "final", model)
    terminal = Terminal(f"path={path}", "temperature=0", "response_length=90000")
    try:
        assert "Ctrl-C stops an answer, Ctrl-D leaves\n> " in terminal.read("> ")
        # CPython's readline misses a signal between its prompt and its select()
        for _ in range(150):
            terminal.type("\x03")
            if select.select([terminal.descriptor], [], [], 2)[0]:
                break
        assert terminal.read("> ").endswith("\n[Ctrl-D or /exit leaves]\n> ")
        terminal.type("Hi\n")
        terminal.read("abcdefghijabc")
        terminal.type("\x03")
        assert terminal.read("> ").endswith(" [stopped]\n> ")
        terminal.type("/undo\n")
        assert terminal.read("d]\r\n> ").endswith("[0 rounds remembered]\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=300) == 0
    finally:
        terminal.close()
