"""The socket unit of the downloading process, without systemd."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


class Unit:
    """As the socket unit: a process for each connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.processes: list[subprocess.Popen[bytes]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                # Descriptor 3, as systemd passes it.
                script = 'exec 3<&0 0</dev/null; LISTEN_FDS=1 exec "$@"'
                command = ["sh", "-c", script, "sh", sys.executable, "-m", "ai_assistant.daemon.fetch"]
                self.processes.append(
                    subprocess.Popen(command, stdin=sock.fileno(), cwd=CHECKOUT, stderr=subprocess.PIPE)
                )
                sock.close()

    def close(self) -> None:
        self._listener.close()
        for each in self.processes:
            each.kill()
            each.wait()
            assert each.stderr is not None
            each.stderr.close()
