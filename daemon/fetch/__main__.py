"""Entry point of the fetching process: `python3 -m ai_assistant.daemon.fetch`.

The connection is descriptor 3 from systemd (Accept=yes). Status 0: answered, or the daemon has gone; 1: the daemon does
not speak the protocol; 2: started wrongly.
"""

from __future__ import annotations

import os
import resource
import socket
import sys

from ai_assistant.daemon.fetch.process import FetchProcess
from ai_assistant.daemon.worker.frames import ProtocolError


def main() -> int:
    if os.environ.get("LISTEN_FDS") != "1" or os.environ.get("LISTEN_PID", str(os.getpid())) != str(os.getpid()):
        print("ai-assistant-fetch: there is no connection; it is started by its socket unit", file=sys.stderr)
        return 2
    # A core of this process would hold somebody's token.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        FetchProcess(socket.socket(fileno=3)).serve()
    except (ProtocolError, OSError) as error:
        print(f"ai-assistant-fetch: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
