"""``python3 -m ai_assistant.daemon``: the daemon, normally started by systemd or the bus."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from ai_assistant.errors import AIAssistantError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ai-assistantd", description="Serves models on the system bus and a socket.")
    parser.add_argument("--root", type=Path, default=Path("/"), help="prefix of /usr, /etc, /run, /proc and /sys")
    parser.add_argument("--bus-address", default="", help="D-Bus address (default: the system bus)")
    parser.add_argument("--api-socket", type=Path, help="make this socket when none is passed by the service manager")
    parser.add_argument("--worker-socket", type=Path, default=Path("/run/ai-assistant/worker.sock"))
    parser.add_argument("--gpu-worker-socket", type=Path, default=Path("/run/ai-assistant/gpu-worker.sock"))
    parser.add_argument("--fetch-socket", type=Path, default=Path("/run/ai-assistant/fetch.sock"))
    parser.add_argument("--state-directory", type=Path, default=Path("/var/lib/ai-assistant"))
    values = vars(parser.parse_args(arguments))
    try:
        return asyncio.run(_run(values))
    except AIAssistantError as error:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("ai-assistantd").error("%s%s", error.message, f" (hint: {error.hint})" if error.hint else "")
        # 78 is EX_CONFIG: restarting does not help, and the unit says so.
        return 78 if error.name == "InvalidConfig" else 1


async def _run(values: dict[str, object]) -> int:
    from ai_assistant.daemon.app import App, Options

    return await App(Options(**values)).run()  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
