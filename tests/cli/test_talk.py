"""`run` and `chat` against the real API server, in this process and as programs."""

from __future__ import annotations

import codecs
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ai_assistant import errors
from ai_assistant.daemon.contract import Scope
from tests.cli.conftest import CHECKOUT, PROGRAM, Cli, program
from tests.sdk.served import Served


def test_one_shot(cli: Cli, api: Served) -> None:
    result = cli("run", "assistant", "one two")
    assert (result.status, result.out, result.err) == (0, "one two \n", "")
    sent = api.service.requests[-1].messages
    assert sent == ({"role": "user", "content": "one two"},)


def test_options_become_parameters(cli: Cli, api: Served, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"name": {"type": "string"}}}')
    result = cli(
        "run", "writer:2", "Ada", "--system", "be brief", "-m", "9", "-t", "0.5", "--top-p", "0.25", "--seed", "7",
        "--stop", "a", "--stop", "b", "--schema", str(schema),
    )  # fmt: skip
    assert json.loads(result.out) == {"name": "Ada"}
    sent = api.service.requests[-1]
    assert sent.messages is not None
    assert sent.messages[0] == {"role": "system", "content": "be brief"}
    assert (sent.max_tokens, sent.temperature, sent.top_p, sent.seed) == (9, 0.5, 0.25, 7)
    assert sent.stop == ("a", "b")
    assert sent.response_schema == json.loads(schema.read_text())


def test_raw(cli: Cli, api: Served) -> None:
    assert cli("run", "assistant", "--raw", "once upon").out == "once upon \n"
    assert api.service.requests[-1].prompt == "once upon"


def test_stats_go_to_stderr(cli: Cli, api: Served) -> None:
    result = cli("run", "assistant", "--stats", "one two")
    assert result.out == "one two \n"
    assert result.err == "2 tokens read in 0.50 s, 2 written in 0.75 s (2.7/s), 1.5 J\n"


def test_devices_are_named_where_that_was_asked(cli: Cli, api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    result = cli("run", "assistant", "--stats", "--hetero-compute", "ON", "one two")
    assert result.err.rstrip().endswith("1.5 J, on cpu")
    assert api.service.requests[-1].hetero_compute == "ON"
    monkeypatch.setenv("HETERO_COMPUTE", "efficiency")
    end = cli("run", "assistant", "one two", "--json").lines[-1]
    assert end["usage"]["devices"] == ["cpu"]
    assert api.service.requests[-1].hetero_compute == "efficiency"
    result = cli("run", "assistant", "--hetero-compute", "on,off", "one two")
    assert result.status == 1
    assert "stands alone" in result.err
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    assert cli("chat", "--model", "assistant", "--hetero-compute", "latency").status == 0
    assert api.service.requests[-1].hetero_compute == "latency"


def test_json_is_lines(cli: Cli, api: Served) -> None:
    *pieces, end = cli("run", "assistant", "one two", "--json").lines
    assert pieces == [{"event": "text", "text": "one "}, {"event": "text", "text": "two "}]
    assert end["event"] == "end"
    assert end["model"] == "assistant"
    assert end["finish_reason"] == "stop"
    assert end["tool_calls"] == []
    assert end["usage"]["energy_j"] == 1.5


def test_a_prompt_from_stdin(api: Served) -> None:
    result = program("run", "assistant", "-", stdin="piped 你好\nand more")
    assert (result.status, result.out) == (0, "piped 你好 and more \n")


def test_a_loop_over_a_pipe_remembers(api: Served) -> None:
    result = program("run", "assistant", stdin="first\n\nsecond\n")
    assert (result.status, result.out) == (0, "first \nsecond \n")
    sent = api.service.requests[-1].messages
    assert sent is not None
    assert [each["content"] for each in sent] == ["first", "first ", "second"]


def test_chat_takes_the_default_model(api: Served) -> None:
    *_, end = program("chat", "--json", stdin="hello\n").lines
    assert end["model"] == "writer:2"
    *_, end = program("chat", "--json", "--model", "assistant", stdin="hello\n").lines
    assert end["model"] == "assistant"


@pytest.mark.parametrize(
    ("name", "status"),
    [("NotAuthorized", 3), ("ServiceUnavailable", 4), ("Busy", 1), ("ContextOverflow", 1), ("WorkerCrashed", 1)],
)
def test_errors_have_their_exit_status(cli: Cli, api: Served, name: str, status: int) -> None:
    api.service.errors["it"] = getattr(errors, name)("what went wrong", hint="what to do")
    for text in ("!raise it", "!break it"):
        result = cli("run", "assistant", text)
        assert result.status == status
        assert "error: what went wrong\nhint: what to do\n" in result.err
        as_json = cli("run", "assistant", text, "--json")
        assert as_json.status == status
        assert as_json.error == {"name": name, "message": "what went wrong", "hint": "what to do"}


def test_unknown_models_and_missing_rights(cli: Cli, api: Served) -> None:
    assert cli("run", "nobody", "x", "--json").error["name"] == "NoSuchModel"
    api.allowed.discard(Scope.INFER)
    assert cli("run", "assistant", "x").status == 3


def test_no_daemon_is_4(cli: Cli, nothing: None) -> None:
    for command in (("run", "assistant", "x"), ("chat",), ("status",), ("model", "list")):
        result = cli(*command)
        assert result.status == 4, command
        assert "hint: " in result.err
        assert cli(*command, "--json").error["name"] == "ServiceUnavailable"


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "text"])
def test_files_that_are_no_models(cli: Cli, nothing: None, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        path.write_text("" if kind == "empty" else "I am no model")
    found = cli("run", str(path), "x", "--json")
    assert found.status == 1
    assert found.error["name"] == ("NoSuchModel" if kind == "missing" else "InvalidModel")


def test_a_text_with_control_characters_reaches_a_pipe_as_it_is(api: Served) -> None:
    assert "\x1b[31m" in program("run", "assistant", "a\x1b[31mb").out


def test_a_locale_that_cannot_show_it(api: Served) -> None:
    for locale in ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}):
        result = program("run", "assistant", "20 °C 你好", **locale)
        assert result.status == 0
        assert result.out.startswith("20 ")
    assert program("run", "assistant", "hi", LC_ALL="xx_YY.nonsense").out == "hi \n"


def test_arguments_that_are_no_text(api: Served) -> None:
    done = subprocess.run([*PROGRAM, "run", "assistant", b"bad \xff"], capture_output=True, cwd=CHECKOUT)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert done.stderr.startswith(b"error: ")


def running(*args: str, **more: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*PROGRAM, *args], stderr=subprocess.PIPE, cwd=CHECKOUT, **more)


def test_ctrl_c_cancels_the_generation(api: Served) -> None:
    with running("run", "assistant", "!forever", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in err
    api.wait_for(lambda: api.service.closed_early == 1)


def test_a_reader_that_leaves_cancels_the_generation(api: Served) -> None:
    with running("run", "assistant", "!forever", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(5)
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        process.wait(20)
    assert process.returncode == 141
    assert err == b""
    api.wait_for(lambda: api.service.closed_early == 1)


def test_a_closed_or_full_output(api: Served) -> None:
    shell = f"{sys.executable} -m ai_assistant"
    closed = subprocess.run(f"{shell} run assistant hi >&-", shell=True, cwd=CHECKOUT, capture_output=True)
    assert (closed.returncode, closed.stderr) == (0, b"")
    full = subprocess.run(f"{shell} run assistant hi >/dev/full", shell=True, cwd=CHECKOUT, capture_output=True)
    assert full.returncode == 1
    assert b"No space left" in full.stderr
    assert b"Traceback" not in full.stderr
    assert b"Exception ignored" not in full.stderr
    everything = subprocess.run(f"{shell} run assistant hi <&- >&- 2>&-", shell=True, cwd=CHECKOUT)
    assert everything.returncode == 0


class Terminal:
    """The command line on a terminal of its own."""

    def __init__(self, *args: str, **environment: str) -> None:
        self.master, slave = pty.openpty()
        self.seen = ""
        # A read may end within a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.process = subprocess.Popen(
            [*PROGRAM, *args], stdin=slave, stdout=slave, stderr=slave, cwd=CHECKOUT, start_new_session=True,
            env={**os.environ, "TERM": "xterm", **environment}, preexec_fn=_control,
        )  # fmt: skip
        os.close(slave)

    def until(self, pattern: str, seconds: float = 20.0) -> str:
        """What has come up to and with `pattern`; the rest stays for the next call."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not come; this did: {self.seen!r}"
            try:
                piece = os.read(self.master, 65536)
            except OSError:
                piece = b""
            assert piece, f"it ended; this had come: {self.seen!r}"
            self.seen += self._decoder.decode(piece)
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        try:
            while os.read(self.master, 65536):
                pass
        except OSError:
            pass
        status = self.process.wait(20)
        os.close(self.master)
        return status


def _control() -> None:
    """Make the new terminal the controlling one, so that Ctrl-C is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_conversation_on_a_terminal(api: Served) -> None:
    terminal = Terminal("chat")
    assert "writer:2" in terminal.until("> ")
    terminal.type("hello there\n")
    terminal.until(r"hello there \r\n> ")
    terminal.type("/help\n")
    terminal.until(r"/clear.*(\r\n.*)*> ")
    terminal.type("/nonsense\n")
    terminal.until(r"there is no /nonsense(\r\n.*)*> ")
    terminal.type('"""one\n')
    terminal.until("… ")
    terminal.type('two"""\n')
    terminal.until(r"one two \r\n> ")
    sent = api.service.requests[-1].messages
    assert sent is not None
    assert [each["content"] for each in sent] == ["hello there", "hello there ", "one\ntwo"]
    terminal.type("/system be brief\n")
    terminal.until("> ")
    terminal.type("again\n")
    terminal.until(r"again \r\n> ")
    sent = api.service.requests[-1].messages
    assert sent is not None
    assert [each["content"] for each in sent] == ["be brief", "again"]
    terminal.type("/quit\n")
    assert terminal.end() == 0


def test_ctrl_c_in_a_conversation_stops_the_answer_only(api: Served) -> None:
    terminal = Terminal("chat")
    terminal.until("> ")
    terminal.type("!forever\n")
    terminal.until("tick tick")
    terminal.type("\x03")
    terminal.until("> ")
    api.wait_for(lambda: api.service.closed_early == 1)
    terminal.type("\x03")
    terminal.until("> ")
    api.service.errors["it"] = errors.Busy("too many", hint="wait")
    terminal.type("!raise it\n")
    terminal.until("too many(.|\r\n)*> ")
    terminal.type("still there\n")
    terminal.until(r"still there \r\n> ")
    sent = api.service.requests[-1].messages
    assert sent is not None
    assert [each["content"] for each in sent] == ["still there"]
    terminal.type("\x04")
    assert terminal.end() == 0


def test_colours_follow_the_terminal_and_no_color(nothing: None) -> None:
    assert "\x1b[" in Terminal("status").until("system bus")
    plain = Terminal("status", NO_COLOR="1")
    assert "\x1b[" not in plain.until("system bus")
    assert plain.end() == 4


def test_a_terminal_is_not_steered_by_an_answer(api: Served) -> None:
    terminal = Terminal("run", "assistant", "a\x1b]0;title\x07b")
    text = terminal.until("b ")
    assert "\x1b]" not in text
    assert terminal.end() == 0
