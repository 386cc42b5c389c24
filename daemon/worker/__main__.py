"""Entry point of a worker: `python3 -m ai_assistant.daemon.worker [--fd N]`.

The connection is descriptor 3 from systemd (Accept=yes), or `--fd N`. The process ends with status 0
when the daemon closes it, 1 when the daemon breaks the protocol or the process does not get on with its work,
2 when it is started wrongly, 3 when the engine is broken.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import sys
from collections.abc import Sequence

from ai_assistant.daemon.worker.frames import ProtocolError
from ai_assistant.daemon.worker.server import WorkerServer
from ai_assistant.engines import open_model

_SYSTEMD_FD = 3
_SWITCH_INTERVAL_S = 0.001


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ai-assistant-worker", description="Hold one model for the daemon.")
    parser.add_argument("--fd", type=int, help="descriptor of the connected socket")
    chosen = parser.parse_args(arguments).fd
    fd = chosen if chosen is not None else _systemd_fd()
    if fd is None:
        print("ai-assistant-worker: there is no connection; it is started by its socket unit", file=sys.stderr)
        return 2
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        print(f"ai-assistant-worker: descriptor {fd} is no socket: {error.strerror}", file=sys.stderr)
        return 2
    sock.set_inheritable(False)
    # A core of this process would hold other people's prompts.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The pump must not keep the decoding thread waiting for the interpreter's default 5 ms.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        WorkerServer(sock, open_model).serve()
    except ProtocolError as error:
        print(f"ai-assistant-worker: {error}", file=sys.stderr)
        _leave(1)
    _leave(0)
    return 0


def _systemd_fd() -> int | None:
    if os.environ.get("LISTEN_FDS") != "1" or os.environ.get("LISTEN_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return _SYSTEMD_FD


def _leave(status: int) -> None:
    """End now: a decode step may take seconds, and there is nothing left to save."""
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
