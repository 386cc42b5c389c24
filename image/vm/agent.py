"""The control channel to the agent of the test profile, and QEMU's own monitor: JSON lines over a socket."""

from __future__ import annotations

import base64
import contextlib
import json
import shlex
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from image.vm.process import VMError

AGENT_PORT = "org.ai_assistant1.test"


@dataclass(frozen=True)
class Answer:
    """How a command in the guest ended; code is None when its time was up."""

    code: int | None
    stdout: str
    stderr: str


class Lines:
    """JSON objects, one a line, from a socket whose other end may be gone."""

    def __init__(self, connection: socket.socket, alive: Callable[[], bool]) -> None:
        self.connection = connection
        self._alive = alive
        self._received = b""

    def send(self, message: dict[str, Any]) -> None:
        try:
            self.connection.settimeout(30)
            self.connection.sendall((json.dumps(message) + "\n").encode())
        except OSError as error:
            raise VMError(f"the machine takes no message: {error}") from error

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next object; None when the time is up. A line cut short by a reset is no object and is skipped."""
        deadline = time.monotonic() + timeout_s
        while True:
            while b"\n" not in self._received:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self.connection.settimeout(min(left, 1.0))
                try:
                    data = self.connection.recv(65536)
                except TimeoutError:
                    if not self._alive():
                        raise VMError("the machine is off") from None
                    continue
                except OSError as error:
                    raise VMError(f"the machine is gone: {error}") from error
                if not data:
                    raise VMError("the machine is off")
                self._received += data
            line, _, self._received = self._received.partition(b"\n")
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    return message


class Agent:
    """Runs commands in the guest."""

    def __init__(self, connection: socket.socket, alive: Callable[[], bool]) -> None:
        self._lines = Lines(connection, alive)
        self._next = 0

    def wait_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while (message := self._lines.receive(deadline - time.monotonic())) is not None:
            if message.get("ready"):
                return
        raise VMError(f"not ready within {timeout_s:.0f} s")

    def post(self, *command: str, timeout_s: float = 60.0) -> int:
        """Send a command and do not wait for its end, as for a reboot; its number."""
        self._next += 1
        self._lines.send({"id": self._next, "command": list(command), "timeout_s": timeout_s})
        return self._next

    def execute(self, *command: str, timeout_s: float = 120.0) -> Answer:
        number = self.post(*command, timeout_s=timeout_s)
        # Longer than the guest's own limit, so that the agent's word about it arrives.
        deadline = time.monotonic() + timeout_s + 30
        while (message := self._lines.receive(deadline - time.monotonic())) is not None:
            if message.get("ready"):
                raise VMError(f"the machine started again while it ran {shlex.join(command)}")
            if message.get("id") == number:
                return Answer(message["code"], message["stdout"], message["stderr"])
        raise VMError(f"no answer to {shlex.join(command)} within {timeout_s:.0f} s")

    def read_file(self, path: str) -> bytes:
        """A file of the guest, any bytes."""
        answer = self.execute("base64", "--wrap=0", path)
        if answer.code != 0:
            raise VMError(f"cannot read {path}: {answer.stderr.strip()}")
        return base64.b64decode(answer.stdout)


class Monitor:
    """QEMU's machine protocol: ask, and count what it reports by itself."""

    def __init__(self, connection: socket.socket, alive: Callable[[], bool]) -> None:
        self._lines = Lines(connection, alive)
        self._events: list[str] = []
        if self._lines.receive(20) is None:
            raise VMError("QEMU's monitor does not greet")
        self.execute("qmp_capabilities")

    def execute(self, command: str, timeout_s: float = 120.0, **arguments: Any) -> Any:
        self._lines.send({"execute": command, "arguments": arguments})
        deadline = time.monotonic() + timeout_s
        while (message := self._lines.receive(deadline - time.monotonic())) is not None:
            if "event" in message:
                self._events.append(message["event"])
            elif "error" in message:
                raise VMError(f"{command}: {message['error'].get('desc', message['error'])}")
            elif "return" in message:
                return message["return"]
        raise VMError(f"QEMU's monitor did not answer {command}")

    def human(self, line: str) -> None:
        """A command that only the human monitor has; it says nothing unless something is wrong."""
        said = str(self.execute("human-monitor-command", timeout_s=600, **{"command-line": line})).strip()
        if said:
            raise VMError(f"{line}: {said}")

    def count(self, event: str) -> int:
        """How often QEMU has reported `event` since power-on, such as RESET."""
        self.execute("query-status")  # whatever came before its answer has been read then
        return self._events.count(event)
