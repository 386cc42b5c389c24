"""The serial console: every line with its time since power-on, waiting for a text, typing."""

from __future__ import annotations

import codecs
import contextlib
import re
import socket
import threading
import time
from pathlib import Path

# Firmware and systemd move the cursor and colour their text; a place on the screen starts a new line here.
PLACE = re.compile(r"\x1b\[[0-9;]*[HJ]|\r+\n?")
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[^\[\]]|[\0\x07\x08]")
UNFINISHED = re.compile(r"(\x1b(\[[0-?]*[ -/]*|\][^\x07\x1b]{0,200}\x1b?)?|\r)\Z")


class Console:
    """One serial port over all power cycles of a machine. The log has seconds since power-on before each line."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._file = log.open("a", encoding="utf-8")
        self._changed = threading.Condition()
        self._text = ""
        self._cursor = 0
        self._socket: socket.socket | None = None
        self._reader: threading.Thread | None = None
        self.cycles = 0

    def power_on(self, connection: socket.socket) -> None:
        """Listen to a machine that starts now; what it said before is over for `wait_for`."""
        self.power_off()
        self.cycles += 1
        with self._changed:
            self._text, self._cursor = "", 0
        self._file.write(f"-- power on, number {self.cycles}\n")
        self._socket = connection
        self._reader = threading.Thread(target=self._read, args=(connection, time.monotonic()), daemon=True)
        self._reader.start()

    def power_off(self) -> None:
        """Read what is left and let go; idempotent."""
        if self._reader is not None and self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            self._reader.join(5)
            self._socket.close()
        self._reader = self._socket = None

    def close(self) -> None:
        self.power_off()
        self._file.close()

    def _read(self, connection: socket.socket, power_on: float) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        raw, fresh = "", True
        while True:
            try:
                data = connection.recv(65536)
            except OSError:
                data = b""
            raw += decoder.decode(data, final=not data)
            held = UNFINISHED.search(raw) if data else None
            cut = held.start() if held else len(raw)
            text, raw = CONTROL.sub("", PLACE.sub("\n", raw[:cut])), raw[cut:]
            for piece in text.splitlines(keepends=True):
                if fresh and not piece.strip():
                    continue
                if fresh:
                    self._file.write(f"[{time.monotonic() - power_on:9.3f}] ")
                self._file.write(piece)
                fresh = piece.endswith("\n")
            if not data and not fresh:
                self._file.write("\n")
            self._file.flush()
            with self._changed:
                self._text += text
                self._changed.notify_all()
            if not data:
                return

    @property
    def text(self) -> str:
        """All that was said since power-on, without control sequences."""
        with self._changed:
            return self._text

    def wait_for(self, *texts: str, timeout_s: float) -> str | None:
        """The first of `texts` to appear after the last one found; None when the time is up."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                found = [(at, each) for each in texts if (at := self._text.find(each, self._cursor)) >= 0]
                if found:
                    at, text = min(found)
                    self._cursor = at + len(text)
                    return text
                left = deadline - time.monotonic()
                if left <= 0 or (self._reader is not None and not self._reader.is_alive()):
                    return None
                self._changed.wait(min(left, 1.0))

    def type(self, text: str) -> None:
        """As a person would on the keyboard of the serial terminal; end a line with \\r."""
        assert self._socket is not None, "power on first"
        self._socket.sendall(text.encode())

    def tail(self, characters: int = 8000) -> str:
        """The end of the timed log."""
        self._file.flush()
        return self.log.read_text(encoding="utf-8", errors="replace")[-characters:]
