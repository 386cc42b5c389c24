"""The parent's end of a backend's process: start it, ask it, and end it when it crashes, hangs or talks nonsense."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ai_assistant.errors import AIAssistantError, BackendFailed, DeviceLost, NotSupported
from ai_assistant.hal.remote import wire

_SEND_S = 10
_TAIL = 2000
_HINT = "the next open starts a new process"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a backend's process may take before it is ended. Seconds, bytes.

    Args:
        start_s: to start, load the backend and look for devices or open one.
        answer_s: to answer what costs nothing.
        compile_s: to compile or load a program, and to keep one.
        run_s: to run a program, from when its turn comes.
        memory_bytes: private writable memory; 0: as much as the machine has.
    """

    start_s: float = 30
    answer_s: float = 10
    compile_s: float = 600
    run_s: float = 60
    memory_bytes: int = 0


class Child:
    """One process. Whatever goes wrong with it is a failure for good: start another.

    Args:
        spec: what the process loads: a path, or a name.
        loss: a process that dies is a device that went away (DeviceLost) rather than a defect (BackendFailed).

    Raises:
        BackendFailed: it cannot be started.
    """

    def __init__(self, spec: str, limits: Limits, *, loss: bool = False) -> None:
        self.limits = limits
        self._what = Path(spec).name[:60]
        self._error: type[AIAssistantError] = DeviceLost if loss else BackendFailed
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._asking = threading.Lock()
        self._pending: dict[int, Future[dict[str, Any]]] = {}
        self._number = 0
        self._failure = ""
        self._ending = False
        self._tail = b""
        self.confinement: Mapping[str, str] = {}
        """What its process gave up before it loaded the backend, each with "yes" or why not."""
        self._hello: Future[dict[str, Any]] = Future()
        self._pending[0] = self._hello
        self._start(spec)

    def _start(self, spec: str) -> None:
        if not sys.executable:
            raise NotSupported("there is no Python program to start a backend's process with")
        folder = str(Path(spec).resolve().parent) if "/" in spec else ""
        memory = self.limits.memory_bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._socket, theirs = socket.socketpair()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _SEND_S, 0))
        lifeline, self._lifeline = os.pipe2(os.O_CLOEXEC)
        self._output, output = os.pipe2(os.O_CLOEXEC)
        arguments = [str(theirs.fileno()), str(lifeline), str(memory), folder]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "ai_assistant.hal.confine", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(), lifeline),
                start_new_session=True,
                cwd="/",
                env=_environment(),
            )
        except OSError as error:
            self._socket.close()
            os.close(self._lifeline)
            os.close(self._output)
            raise BackendFailed(f"no process for the backend {self._what} can be started: {error.strerror}") from error
        finally:
            theirs.close()
            os.close(lifeline)
            os.close(output)
        self._reader = threading.Thread(target=self._read, name="hal-remote", daemon=True)
        self._reader.start()
        hello = self._answer(self._hello, "start", self.limits.start_s)
        done = wire.checked(lambda: hello["confinement"] if isinstance(hello.get("confinement"), dict) else {})
        self.confinement = {str(name): str(state) for name, state in done.items()}

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def failed(self) -> bool:
        return bool(self._failure)

    def ask(self, op: str, timeout_s: float, descriptor: int = -1, **fields: object) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Args:
            descriptor: sent with it; stays the caller's.

        Raises:
            BackendFailed or DeviceLost: the process crashed, hung, or broke the protocol.
            …: what the backend answered.
        """
        if op == "run":
            return self._answer(self._request(op, descriptor, fields), op, timeout_s)
        with self._asking:  # the process does these one by one: the time of each begins when its turn comes
            return self._answer(self._request(op, descriptor, fields), op, timeout_s)

    def tell(self, op: str, descriptor: int = -1, **fields: object) -> None:
        """Send what needs no answer. Raises as `ask`."""
        self._send({"op": op, **fields}, descriptor)

    def _request(self, op: str, descriptor: int, fields: Mapping[str, object]) -> Future[dict[str, Any]]:
        answer: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._failure:
                raise self._lost()
            self._number += 1
            number = self._number
            self._pending[number] = answer
        self._send({"op": op, "id": number, **fields}, descriptor)
        return answer

    def _answer(self, answer: Future[dict[str, Any]], op: str, timeout_s: float) -> dict[str, Any]:
        try:
            return answer.result(timeout_s)
        except FutureTimeout:
            # An answer that came in this moment comes too late all the same: the process is being ended.
            self._fail(f"did not answer to {op!r} within {timeout_s:g} s")
            raise self._lost() from None

    def _send(self, message: Mapping[str, Any], descriptor: int) -> None:
        try:
            data = wire.frame(message)
        except wire.Garbage as error:
            raise NotSupported(f"this is too much for another process: {error}") from error
        with self._sending:
            if self._failure:
                raise self._lost()
            try:
                rest = memoryview(data)
                if descriptor >= 0:
                    rest = rest[socket.send_fds(self._socket, [rest], [descriptor]) :]
                while rest:
                    rest = rest[self._socket.send(rest) :]
                return
            except BlockingIOError:
                reason = f"read nothing for {_SEND_S} s"
            except OSError:
                reason = ""  # the reader finds out what it died of
        if reason:
            self._fail(reason)
        else:
            self._reader.join(_SEND_S)
        raise self._lost()

    def _fail(self, reason: str) -> None:
        """End the process for a reason, once; whoever waits is told."""
        with self._lock:
            self._failure = self._failure or reason or "ended"
            waiting = list(self._pending.values())
            self._pending.clear()
        self._process.kill()
        for each in waiting:
            if not each.done():
                each.set_exception(self._lost())

    def _lost(self) -> AIAssistantError:
        pid = self._process.pid
        return self._error(f"the backend {self._what} (process {pid}) {self._failure or 'ended'}", hint=_HINT)

    # --------------------------------------------------------------------------------------------- the reader's thread

    def _read(self) -> None:
        buffer = bytearray()
        reason = ""
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._output, selectors.EVENT_READ)
            try:
                while not reason:
                    for key, _ in selector.select():
                        if key.fd == self._output:
                            if not self._read_output():
                                selector.unregister(self._output)
                            continue
                        data = _receive(self._socket)
                        if data is None:
                            continue
                        if not data:
                            reason = "ended"
                            break
                        buffer += data
                        while (message := wire.take(buffer)) is not None:
                            self._take(message)
            except wire.Garbage as error:
                reason = f"broke the protocol: {error}"
        if reason == "ended":
            reason = self._how_it_ended()
        self._fail(reason)
        self._process.wait()
        with self._sending:
            self._socket.close()
        os.close(self._output)
        os.close(self._lifeline)

    def _take(self, message: dict[str, Any]) -> None:
        number = wire.integer(message.get("id"))
        with self._lock:
            answer = self._pending.pop(number, None)
        if answer is None:
            raise wire.Garbage("it answered to what nobody asked")
        if "error" in message:
            try:
                answer.set_exception(wire.error(message["error"]))
            except wire.Garbage:
                with self._lock:
                    self._pending[number] = answer
                raise
        else:
            answer.set_result(message)

    def _read_output(self) -> bool:
        data = os.read(self._output, 1 << 16)
        self._tail = (self._tail + data)[-_TAIL:]
        return bool(data)

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "closed its connection without ending"
        os.set_blocking(self._output, False)
        try:
            while self._read_output():
                pass
        except BlockingIOError:
            pass
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"
        lines = [each for each in self._tail.decode(errors="replace").splitlines() if each.strip()]
        return f"{how}: {wire.text(lines[-1].strip())}" if lines and not self._ending else how

    def end(self, timeout_s: float = 5) -> None:
        """Let it end, or end it. Idempotent; what was asked meanwhile fails."""
        self._ending = True
        if not self._failure:
            with suppress(AIAssistantError):
                self.ask("close", timeout_s)
        self.kill()
        if self._reader is not threading.current_thread():
            self._reader.join(timeout_s)

    def kill(self) -> None:
        """End it at once, without waiting."""
        self._fail("was closed")


def _receive(connection: socket.socket) -> bytes | None:
    try:
        return connection.recv(1 << 16, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _environment() -> dict[str, str]:
    """Next to nothing of ours: variables may hold what is none of a vendor's business."""
    kept = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "AI_ASSISTANT_ENGINE", "LLAMA_CPP_LIB_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    paths = [str(Path(each or ".").resolve()) for each in sys.path]
    return environment | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/"}
