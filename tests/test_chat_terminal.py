"""An interactive chat, driven through a pseudo terminal, and its parts."""

import json
import os
import pty
import re
import select
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from precast.loaders.console import chat_input, speed
from precast.loaders.console import conversation as chat_console
from precast.loaders.console.chat_history import History, history_file

PROMPT = "> "
# Ctrl-C needs a controlling terminal. The model answers with its conversation as JSON, then with a sequence that would
# set the clipboard; it never answers "wait".
CHILD = r"""
import fcntl, json, os, sys, termios, time
from types import SimpleNamespace
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from precast.cli import main
from precast.loaders.generation.model import Model

class Stream:
    timing = SimpleNamespace(prefill_s=0.25, decode_s=0.5, decode_tokens_per_s=8.0)
    completion = SimpleNamespace(
        tool_calls=(), token_ids=range(5), prompt_token_ids=range(10), finish_reason="stop", timing=timing,
        message=lambda: {"role": "assistant", "content": ""},
    )
    is_split = False
    def __init__(self, messages): self.messages = messages
    def __iter__(self):
        yield json.dumps([m["content"] for m in self.messages if m["role"] != "assistant"])
        if self.messages[-1]["content"] == "wait":
            time.sleep(60)
        yield "\x1b"
        yield "]52;c;eA==\x07"

Model.stream_chat = lambda self, messages, params, literal, template_variables: Stream(messages)
main()
"""


class Terminal:
    """A process on a pseudo terminal."""

    def __init__(self, arguments, env):
        self._own, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *map(str, arguments)],
            stdin=other,
            stdout=other,
            stderr=other,
            # Remove the user's settings for colours and keys.
            env={
                **{name: value for name, value in os.environ.items() if name != "NO_COLOR"},
                "TERM": "xterm",
                "INPUTRC": os.devnull,
                "PYTHONIOENCODING": "utf-8:strict",
                **env,
            },
        )
        os.close(other)

    def until(self, text, timeout=120):
        """Return the output, without colours, until it ends in a text."""
        shown, end = b"", time.monotonic() + timeout
        while not plain(shown.decode(errors="replace")).endswith(text):
            ready, _, _ = select.select([self._own], [], [], max(0, end - time.monotonic()))
            assert ready, f"waited for {text!r} in vain after {shown!r}"
            try:
                shown += os.read(self._own, 65536)
            except OSError:  # the other end is closed
                break
        return shown.decode(errors="replace")

    def send(self, data, until=PROMPT):
        os.write(self._own, data.encode() if isinstance(data, str) else data)
        return self.until(until)

    def rest(self, data):
        """Return the output from here to the end of the process."""
        os.write(self._own, data.encode())
        shown = self.until("\0nothing like it")
        self.process.wait(timeout=60)
        return shown

    def close(self):
        self.process.kill()
        self.process.wait(timeout=60)
        os.close(self._own)


@pytest.fixture
def chat(tiny_artifact, tmp_path):
    """Start chats with the tiny artifact; the history is `tmp_path / "history"`."""

    @contextmanager
    def start(*options, **env):
        terminal = Terminal(
            ["chat", tiny_artifact, *options], {"PRECAST_HISTORY": str(tmp_path / "history"), **env}
        )
        try:
            opening = terminal.until(PROMPT)
            yield terminal, opening
        finally:
            terminal.close()

    return start


def plain(shown):
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", shown)


def asked(shown):
    """Return the conversations that the model received."""
    return [json.loads(found) for found in re.findall(r"\[\".*?\"\](?=�)", shown)]


def test_a_chat_in_a_terminal(chat, tmp_path):
    with chat("--system", "", "--stats") as (terminal, opening):
        assert re.search(r"^tiny on cpu-\S+, 64 positions\. /help lists the commands, Ctrl-D ends", opening)
        pasted = terminal.send("\x1b[200~one\rtwo\r\rthree\x1b[201~", until="three")
        assert asked(pasted) == []  # nothing is sent yet
        assert asked(terminal.send("\r")) == [["", "one\ntwo\n\nthree"]]
        # Without bracketed paste, a terminal delivers pasted lines together.
        shown = terminal.send("four\rfive\r")
        assert asked(shown) == [["", "one\ntwo\n\nthree", "four\nfive"]]
        assert "\x1b]" not in shown
        assert "�]52;c;eA==�" in shown
        assert "\x1b[2m5 tokens, 8.0 tokens/s, first after 0.25 s\x1b[0m" in shown
        terminal.send("/reset\r")
        assert asked(terminal.send("/etc/passwd is what?\r")) == [["", "/etc/passwd is what?"]]
        assert "/reset   forget the conversation" in terminal.send("/help\r")
        terminal.send('"""six\r', until="… ")
        terminal.send("\r", until="… ")
        assert asked(terminal.send('seven"""\r'))[0][-1] == "six\n\nseven"
        assert "error: expected text in utf-8, found other bytes." in terminal.send(b"\xff\xfe\r")
        terminal.send("wait\r", until='"wait"]')
        assert " …" in terminal.send("\x03")
        terminal.send("half a line", until="half a line")
        time.sleep(0.5)  # readline sees an earlier signal only with the next key
        terminal.send("\x03")
        assert asked(terminal.send("go on\r"))[0][-2:] == ["wait", "go on"]
        end = terminal.rest("/exit\r")
        assert "5 answers: prompt 50 tokens in 1250 ms (40.0 tokens/s); generated 25 tokens at 8.0" in end
        assert terminal.process.returncode == 0
    kept = [json.loads(line) for line in (tmp_path / "history").read_text().splitlines()]
    texts = ["one\ntwo\n\nthree", "four\nfive", "/etc/passwd is what?", "six\n\nseven", "wait", "go on"]
    assert kept == texts
    with chat(NO_COLOR="1") as (terminal, _):
        terminal.send("\x1b[A\x1b[A", until="wait")
        shown = terminal.send(" for it\r")
        assert asked(shown) == [["wait for it"]]
        assert "(5 tokens, 8.0 tokens/s, first after 0.25 s)" in shown
        terminal.rest("\x04")
        assert terminal.process.returncode == 0


def test_a_chat_without_line_editing_and_history(chat, tmp_path):
    (tmp_path / "readline.py").write_text("raise ImportError")
    with chat(PRECAST_HISTORY="off", TERM="dumb", PYTHONPATH=str(tmp_path)) as (terminal, _):
        assert asked(terminal.send("one\ntwo\n")) == [["one\ntwo"]]
        assert "\x1b" not in terminal.rest("\x04")
    assert os.listdir(tmp_path) == ["readline.py"]


# --- what is typed ------------------------------------------------------------------------------------------


def typed(*lines):
    """Return the messages of typed lines; the lines in one tuple arrive together."""
    together = [group if isinstance(group, tuple) else (group,) for group in lines]
    waiting = [line for group in together for line in group]
    behind = [place < len(group) - 1 for group in together for place in range(len(group))]
    state = {"next": 0}

    def read(_):
        if state["next"] == len(waiting):
            raise EOFError
        line = waiting[state["next"]]
        state["next"] += 1
        if isinstance(line, BaseException):
            raise line
        return line

    return list(chat_input.messages(read, lambda: behind[state["next"] - 1]))


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (["hi", " ", "there"], ["hi", "there"]),
        ([("a", "", "b"), "c"], ["a\n\nb", "c"]),
        (["a\nb\n"], ["a\nb"]),
        (["/reset", "/exit", " /help "], ["/reset", "/exit", "/help"]),
        (["/resets", "/", "/usr/bin", "/exit now"], ["/resets", "/", "/usr/bin", "/exit now"]),
        (["/reset\ntext"], ["/reset\ntext"]),
        ([("/reset", "hi", "/exit")], ["/reset", "hi", "/exit"]),
        (['"""a', "", "/exit", 'b"""', "c"], ["a\n\n/exit\nb", "c"]),
        (['"""one line"""', '"""', "two", '"""'], ["one line", "two"]),
        ([('"""doc', "string"), "x"], ['"""doc\nstring', "x"]),
        (['"""doc\nstring', "x"], ['"""doc\nstring', "x"]),
        (['"""never closed', "b"], ["never closed\nb"]),
        (["a", KeyboardInterrupt(), "b"], ["a", "b"]),
        (['"""a', KeyboardInterrupt(), "b"], ["b"]),
        ([UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), "b"], ["b"]),
    ],
)
def test_messages_of_lines(lines, messages, capsys):
    assert typed(*lines) == messages


# --- history ------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "precast" / "chat_history"


def test_a_history_is_private(path):
    old = os.umask(0)
    try:
        History(path).add("hi")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    assert History(path).messages == ["hi"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_history_is_bounded(path):
    history = History(path)
    assert not history.add("x" * 50_001)
    for number in range(1500):
        assert history.add(f"message {number}")
    assert History(path).messages == [f"message {n}" for n in range(500, 1500)]
    assert len(path.read_text().splitlines()) == 500
    path.write_bytes(path.read_bytes() + (json.dumps("y" * 1000).encode() + b"\n") * 2000)
    assert set(History(path).messages) == {"y" * 1000}
    assert path.stat().st_size < 1_000_000
    assert os.listdir(path.parent) == [path.name]


def test_invalid_lines_of_a_history_are_skipped(path):
    path.parent.mkdir(parents=True)
    path.write_bytes(b'"a"\n"cut\n{"no": 1}\n\xff\n"\\u0000"\n"\\ud800"\n""\n"b\\nc"\n"not whole')
    assert History(path).messages == ["a", "b\nc"]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "file for a folder"])
def test_a_history_that_cannot_be_written_is_reported(path, tmp_path, kind):
    path.parent.parent.mkdir()
    if kind == "file for a folder":
        path.parent.write_text("")
    else:
        path.parent.mkdir()
    if kind == "link":
        (tmp_path / "other").write_text('"mine"\n')
        path.symlink_to(tmp_path / "other")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    history = History(path)
    assert history.messages == []
    assert history.problem.startswith(f"the history of this chat is not saved: {path}: ")
    assert history.problem.endswith("; set PRECAST_HISTORY to another file, or to off.")
    assert history.add("secret")
    assert kind != "link" or (tmp_path / "other").read_text() == '"mine"\n'


def test_where_a_history_is(monkeypatch, tmp_path, homeless):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("PRECAST_HISTORY", raising=False)
    assert history_file() is None
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "precast" / "chat_history"
    monkeypatch.setenv("PRECAST_HISTORY", str(tmp_path / "own"))
    assert history_file() == tmp_path / "own"
    monkeypatch.setenv("PRECAST_HISTORY", "off")
    assert history_file() is None
    assert History(None).add("hi")


# --- what is shown ------------------------------------------------------------------------------------------


def completion(tokens, reason="stop"):
    decode = (tokens - 1) / 10
    timing = SimpleNamespace(prefill_s=0.5, decode_s=decode, decode_tokens_per_s=10.0 if tokens > 1 else 0.0)
    return SimpleNamespace(
        token_ids=range(tokens), prompt_token_ids=range(20), finish_reason=reason, timing=timing
    )


def test_speed_in_words():
    assert speed.brief(completion(1)) == "1 token, first after 0.50 s"
    assert speed.brief(completion(1001)) == "1,001 tokens, 10.0 tokens/s, first after 0.50 s"
    assert speed.brief(completion(3, "length")).endswith("0.50 s, cut off at the limit")
    assert speed.full([completion(3)], 0.75) == (
        "prompt 20 tokens in 500 ms (40.0 tokens/s), first token 0.75 s after the start;"
        " generated 3 tokens at 10.0 tokens/s"
    )
    assert speed.full([completion(1)]) == "prompt 20 tokens in 500 ms (40.0 tokens/s); generated 1 token"
    assert speed.full([completion(3), completion(1)]).startswith("2 answers: prompt 40 tokens in 1000 ms")


def test_speed_at_the_end_of_a_run_on_standard_error(cli, tiny_artifact):
    line = (
        r"prompt 3 tokens in \d+ ms \([\d.]+ tokens/s\), first token [\d.]+ s after the start;"
        r" generated 5 tokens at [\d.]+ tokens/s\n"
    )
    arguments = ("run", tiny_artifact, "--ids", "7,200,31", "-n", "5", "--ignore-eos")
    quiet = cli(*arguments)
    assert quiet.stderr == ""
    asked = cli(*arguments, "--stats")
    assert re.fullmatch(line, asked.stderr)
    assert asked.stdout == quiet.stdout
    as_json = cli(*arguments, "--json", "--stats")
    assert re.fullmatch(line, as_json.stderr)
    assert json.loads(as_json.stdout)["text"] == quiet.stdout.removesuffix("\n")


def test_a_chat_with_piped_input_answers_once(cli, tiny_artifact):
    expected = cli("run", tiny_artifact, "--chat", "--system", "be a cat", "-p", "the dog", "-n", "4").stdout
    assert cli("chat", tiny_artifact, "--system", "be a cat", "-n", "4", stdin="the dog\n").stdout == expected


def test_the_dim_line_is_plain_where_colours_are_not_wanted(monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    chat_console._print_aside("words")  # this is no terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    chat_console._print_aside("words")
    monkeypatch.setenv("NO_COLOR", "1")
    chat_console._print_aside("words")
    assert capsys.readouterr().out == "(words)\n\x1b[2mwords\x1b[0m\n(words)\n"
