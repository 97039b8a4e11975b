"""rlhf.chat on tiny models: what is streamed, what ends it, the conversation, the terminal.

Run: python -m pytest tests/commands/test_chat.py
"""

from __future__ import annotations

import io
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer

import rlhf.chat
from rlhf.chat import Chat, ChatOptions, printable, talk
from rlhf.checkpoint import make_record, write_stage
from rlhf.config import ModelConfig, StageConfig
from rlhf.data import encode_prompt
from rlhf.models import init_reward_model, load_policy
from rlhf.options import run_command
from rlhf.sampling import generate, sampling_for, stream, uniform_noise
from rlhf.tokenizer import chat_template_text, declare_stop_strings, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PLAIN = chat_template_text("plain")
TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write(directory, model, stage="sft", prompts="conversation"):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PLAIN
    record = make_record(stage, StageConfig(), None, tokenizer, prompts)
    write_stage(directory, model, tokenizer, StageConfig(), record)
    return directory


def scripted(answer, **config):
    """A model that says `answer` after a prompt that ends with a newline, as those of `plain` do.

    Each token has a one-hot embedding, the layers add nothing, and the head maps a token to the
    one that follows it in the answer; after its last token comes the first one again.
    """
    width = len(TOKENIZER)
    model = tiny_model(
        "llama", TOKENIZER, hidden_size=width, num_hidden_layers=1, **{"head_dim": 80} | config
    )
    newline, *ids = TOKENIZER("\n" + answer)["input_ids"]
    assert len({newline, *ids}) == 1 + len(ids), "every token has one that follows it"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(width))
        for before, after in zip([newline, *ids], [*ids, ids[0]], strict=True):
            model.get_output_embeddings().weight[after, before] = 10.0
    return model


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A random policy: it emits any bytes, and ends now and then."""
    model = tiny_model("llama", TOKENIZER)
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *range(10, 320, 40)]
    return write(tmp_path_factory.mktemp("runs") / "random" / "sft" / "final", model)


@pytest.fixture(scope="module")
def reward_model(policy, tmp_path_factory):
    config = ModelConfig(path=str(policy))
    directory = tmp_path_factory.mktemp("reward")
    return write(directory, init_reward_model(config, load_tokenizer(config), 0), "reward")


def chat_with(path, **options):
    return Chat(ChatOptions(path=str(path), **options))


def answer_of(chat, question, number=0):
    return "".join(chat.ask(question, number))


# --- What is streamed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs",
    [{}, {"temperature": 0.5, "seed": 7}, {"top_p": 0.8, "top_k": 40}, {"temperature": 0.0}],
)
def test_streamed_text_is_that_of_generate(policy, knobs):
    chat = chat_with(policy, max_new_tokens=20, **knobs)
    tokenizer = load_tokenizer(ModelConfig(path=str(policy)))
    model = load_policy(ModelConfig(path=str(policy)), tokenizer)
    ends = set()
    for number in range(8):
        question = "Name a fruit " * number
        chat.reset()
        text = answer_of(chat, question, number)
        prompt = encode_prompt([{"role": "user", "content": question}], tokenizer)
        budget = min(20, 128 - len(prompt))
        temperature = knobs.get("temperature", 1.0)
        noise = uniform_noise((knobs.get("seed", 1), number), [0], budget) if temperature else None
        sampling = sampling_for(
            model,
            tokenizer,
            budget,
            temperature or 1.0,
            knobs.get("top_p", 1.0),
            knobs.get("top_k", 0),
        )
        whole = generate(model, [prompt], sampling, noise)
        assert text == tokenizer.decode(whole.ids[0], skip_special_tokens=True)
        assert chat.cut_off == (not whole.finished[0])
        ends.add(chat.cut_off)
    assert ends == {True, False} or not knobs.get("temperature", 1)


def test_stream_yields_the_tokens_of_generate_and_leaves_training_mode_as_it_was():
    model = tiny_model("llama", TOKENIZER, attention_dropout=0.5).train()
    sampling = sampling_for(model, TOKENIZER, 20, 1.0)
    noise = uniform_noise((1,), [0], 20)
    recorded = []
    model.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    tokens = stream(model, [40, 41, 42], sampling, noise)
    first = next(tokens)
    assert not model.training and torch.is_grad_enabled()
    assert [[first, *tokens]] == generate(model, [[40, 41, 42]], sampling, noise).ids
    assert all(module.training for module in model.modules())
    assert not any(recorded)
    given_up = stream(model, [40, 41, 42], sampling, noise)
    next(given_up)
    given_up.close()
    assert all(module.training for module in model.modules())


def test_characters_of_several_tokens_are_streamed_whole(tmp_path):
    text = "hé 🙂!"
    assert len(TOKENIZER(text)["input_ids"]) > len(text)
    chat = chat_with(write(tmp_path / "final", scripted(text + EOS)), temperature=0)
    assert list(filter(None, chat.ask("Hi", 0))) == list(text)
    assert not chat.cut_off


def test_character_that_stays_incomplete_comes_at_the_end(tmp_path):
    path = write(tmp_path / "final", scripted("a🙂"))
    chat = chat_with(path, temperature=0, max_new_tokens=3)
    assert list(chat.ask("Hi", 0)) == ["a", "\ufffd"]
    assert chat.cut_off


@pytest.mark.parametrize(
    "said, stops, pieces, cut_off",
    [
        # the space and "x", "xy" are held back: they may come before, or begin, a stop string
        ("ab xyz", ["xyz"], ["a", "b"], False),
        ("ab xyc" + EOS, ["xyz"], ["a", "b", " xyc"], False),
        ("ab xy" + EOS, ["xyz"], ["a", "b", " xy"], False),
        ("ab \t" + EOS, ["xyz"], ["a", "b"], False),
        ("abcde", ["cdf", "de"], ["a", "b", "c"], False),  # "cd" was the beginning of another one
        ("aé🙂b", ["🙂"], ["a", "é"], False),
        ("abc d", ["never"], ["a", "b", "c", " d", "a", "b"], True),
    ],
)
def test_no_part_of_a_stop_string_is_streamed(tmp_path, said, stops, pieces, cut_off):
    path = write(tmp_path / "final", scripted(said))
    template = declare_stop_strings(PLAIN, stops)
    chat = chat_with(path, temperature=0, chat_template=template, max_new_tokens=7)
    shown = list(filter(None, chat.ask("Hi", 0)))
    assert (shown, chat.cut_off) == (pieces, cut_off)
    assert chat.rounds == [("Hi", "".join(pieces))]


def test_every_stop_token_of_the_generation_config_ends_an_answer(tmp_path):
    model = scripted("abc")
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *TOKENIZER("b")["input_ids"]]
    chat = chat_with(write(tmp_path / "final", model), temperature=0)
    assert answer_of(chat, "Hi") == "ab"
    assert not chat.cut_off


def test_sampling_of_the_generation_config_applies_unless_options_say_otherwise(tmp_path):
    model = tiny_model("llama", TOKENIZER)
    given = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    for name, value in (given | {"repetition_penalty": 1.1}).items():
        setattr(model.generation_config, name, value)
    path = write(tmp_path / "final", model)
    chat = chat_with(path, top_k=0)
    assert (chat.temperature, chat.sampling.top_p, chat.sampling.top_k) == (0.6, 0.9, 0)
    assert "not applied from its generation config: repetition_penalty=1.1" in chat.describe()
    assert chat_with(path, temperature=0).temperature == 0


def test_generation_config_that_asks_for_greedy_answers_gets_them(tmp_path):
    model = tiny_model("llama", TOKENIZER)
    model.generation_config.do_sample = False
    path = write(tmp_path / "final", model)
    assert chat_with(path).temperature == 0
    assert chat_with(path, temperature=0.5).temperature == 0.5


# --- The conversation -----------------------------------------------------------------------------


def test_later_questions_follow_the_rounds_before(policy):
    chat = chat_with(policy, max_new_tokens=6, system="Be brief.")
    first = answer_of(chat, "Name a fruit.", 0)
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Another."},
    ]
    assert chat.prompt("Another.")[0] == encode_prompt(asked, chat.tokenizer)
    answer_of(chat, "Another.", 1)
    chat.undo()
    assert chat.rounds == [("Name a fruit.", first)]
    chat.reset()
    chat.undo()
    assert chat.prompt("Another.")[0] == encode_prompt([asked[0], asked[3]], chat.tokenizer)


def test_oldest_rounds_are_left_out_when_the_context_is_full(tmp_path, capsys):
    path = write(tmp_path / "final", scripted("abcdefghij"))  # 128 tokens of context
    chat = chat_with(path, temperature=0, max_new_tokens=30)
    for number in range(6):
        assert len(answer_of(chat, f"Q{number}", number)) == 30
    messages = [{"role": "user", "content": "Q5"}]
    prompt, room = chat.prompt("Q6")
    assert 30 <= room == 128 - len(prompt)
    assert chat.rounds[-1][0] == "Q5" and 0 < len(chat.rounds) < 6
    for asked, answered in reversed(chat.rounds):
        messages[:0] = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
        ]
    messages[-1] = {"role": "user", "content": "Q6"}
    assert prompt == encode_prompt(messages, chat.tokenizer)
    assert capsys.readouterr().err == (
        "[the context of 128 tokens is full: the oldest rounds are left out]\n"
    )


def test_budget_beyond_the_context_leaves_half_of_it_to_the_conversation(tmp_path):
    chat = chat_with(write(tmp_path / "final", scripted("abcdefghij" + EOS)), temperature=0)
    assert chat.sampling.max_new_tokens == 256
    assert answer_of(chat, "Hi") == "abcdefghij"
    answer_of(chat, "Hi")
    assert len(chat.rounds) == 2


def test_question_longer_than_the_context_is_refused_and_nothing_else_happens(policy, capsys):
    chat = chat_with(policy, max_new_tokens=5)
    answer_of(chat, "Hi")
    before = list(chat.rounds)
    assert answer_of(chat, "long " * 100) == ""
    assert chat.rounds == before != []
    tokens = len(encode_prompt([{"role": "user", "content": "long " * 100}], chat.tokenizer))
    error = f"[not answered: the question has {tokens} tokens, but the model's context has 128]\n"
    assert capsys.readouterr().err == error


def test_answer_that_is_given_up_keeps_what_was_said(tmp_path):
    chat = chat_with(write(tmp_path / "final", scripted("abcdefghij")), temperature=0)
    pieces = chat.ask("Hi", 0)
    assert next(pieces) + next(pieces) == "ab"
    pieces.close()
    assert chat.rounds == [("Hi", "ab")]


def test_template_that_rewrites_earlier_turns_serves_a_model_of_no_stage(tmp_path):
    """As Qwen3's, which drops the thoughts of all answers but the last."""
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' and loop.last %}"
        "<think></think>{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    tiny_model("llama", tokenizer).save_pretrained(tmp_path)
    chat = chat_with(tmp_path, max_new_tokens=3)
    first = answer_of(chat, "a")
    text = f"user:a{EOS}assistant:{first}{EOS}user:b{EOS}assistant:"
    assert chat.prompt("b")[0] == tokenizer(text)["input_ids"]


def test_without_chat_template_or_trained_on_text_lines_are_continued(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    tiny_model("llama", TOKENIZER).save_pretrained(tmp_path / "bare")
    write(tmp_path / "text", tiny_model("llama", TOKENIZER), prompts="text")
    for name, why in (
        ("bare", "it has no chat template"),
        ("text", "it was trained on text prompts"),
    ):
        chat = chat_with(tmp_path / name, max_new_tokens=4)
        assert answer_of(chat, "An apple is") != ""
        assert chat.prompt(" a fruit ")[0] == encode_prompt(" a fruit ", chat.tokenizer)
        assert f"{why}: it continues each line as text" in chat.describe()
        as_questions = chat_with(tmp_path / name, chat_template="alpaca")
        assert as_questions.why_text is None
        (prompt, _), start = as_questions.prompt("Hi"), "<bos>Below is an instruction"
        assert chat.tokenizer.decode(prompt).startswith(start)


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capfd):
    """Run the command in this process with lines piped in: (exit status, stdout, stderr)."""

    def run(*arguments, lines=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        status = run_command(str(rlhf.chat.__doc__), ChatOptions, talk, list(arguments))
        return status, *capfd.readouterr()

    return run


def test_piped_questions_are_answered_in_turn(policy):
    path = os.path.relpath(policy, ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "rlhf.chat", f"path={path}", "max_new_tokens=9", "seed=3"],
        cwd=ROOT,
        input="Name a fruit.\n\nAnother.\n",
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    chat = chat_with(policy, max_new_tokens=9, seed=3)
    expected = [answer_of(chat, "Name a fruit.", 0), answer_of(chat, "Another.", 2)]
    assert (done.returncode, done.stdout) == (0, "".join(printable(a) + "\n" for a in expected))
    title, *rest = done.stderr.splitlines()
    assert title.startswith(f"{path}: sft stage, LlamaForCausalLM, 41,120 parameters on ")
    assert all(line.startswith("[cut off: max_new_tokens=9") for line in rest)


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
    arguments = (f"path={path}", "temperature=0", "max_new_tokens=5")
    status, output, errors = command(*arguments, lines="Hi\n/exit\nHo\n")
    assert (status, output) == (0, "abcab\n")
    assert errors.endswith("\n[cut off: max_new_tokens=5, or the end of the context]\n")


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2J\x07\x9b\x7f") == "a\ufffd[2J\ufffd\ufffd\ufffd"
    harmless = "b\tc\né\u200d\u00a0"
    assert printable(harmless) == harmless


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "path is missing; add path=<stage directory, other model directory or Hub id>"),
        (["runs/x"], "cannot read 'runs/x'; write key=value, e.g. path=runs/x"),
        (
            ["path=x", "temprature=1"],
            "unknown option 'temprature'. Did you mean temperature or ",
        ),
        (["path=x", "seed=1.5"], "seed must be of type int, got '1.5'"),
        (["path=x", "temperature=warm"], "temperature must be of type float, got 'warm'"),
        (["path=x", "temperature=-1"], "temperature must be >= 0, got -1.0"),
        (["path=x", "top_p=0"], "top_p must lie in (0, 1], got 0.0"),
        (["path=x", "top_k=-1"], "top_k must be >= 0, got -1"),
        (["path=x", "max_new_tokens=0"], "max_new_tokens must be >= 1, got 0"),
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


def test_help_answers_without_importing_torch(tmp_path):
    probe = (
        "import atexit, runpy, sys; sys.argv = ['rlhf.chat', '--help']\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "runpy.run_module('rlhf.chat', run_name='__main__', alter_sys=True)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "False\n")
    assert all(
        f"\n    {name}" in done.stdout.replace(",", "\n   ") for name in vars(ChatOptions(""))
    )


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

    def read(self, until, timeout=60.0):
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


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(tmp_path):
    model = scripted("abcdefghij", max_position_embeddings=100_000)  # which never stops
    path = write(tmp_path / "final", model)
    terminal = Terminal(f"path={path}", "temperature=0", "max_new_tokens=90000")
    try:
        assert "Ctrl-C stops an answer, Ctrl-D leaves\n> " in terminal.read("> ")
        time.sleep(1)  # CPython's readline misses a signal between its prompt and its select()
        terminal.type("\x03")
        assert terminal.read("> ") == "\n[Ctrl-D or /exit leaves]\n> "
        terminal.type("Hi\n")
        terminal.read("abcdefghijabc")
        terminal.type("\x03")
        assert terminal.read("> ").endswith(" [stopped]\n> ")
        terminal.type("/undo\n")
        assert terminal.read("d]\r\n> ").endswith("[0 rounds remembered]\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
