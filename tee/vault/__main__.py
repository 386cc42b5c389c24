"""``python3 -m ai_assistant.tee.vault``: the service; the options are for tests."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import logging
import resource
import shlex
import sys
from pathlib import Path

from ai_assistant.errors import AIAssistantError
from ai_assistant.tee.vault.service import REFRESH, RESEAL, Options, serve

_PR_SET_DUMPABLE = 4


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ai-assistant-vaultd", description="Answers org.ai_assistant1.Vault.")
    parser.add_argument("--root", type=Path, default=Path("/"), help="read and write below this folder")
    parser.add_argument("--bus-address", default="", help="another bus than the system's")
    parser.add_argument(
        "--idle", type=float, default=30.0, metavar="SECONDS", help="leave after so long without a call"
    )
    parser.add_argument("--reseal", type=shlex.split, default=RESEAL, metavar="COMMAND", help="instead of the real one")
    parser.add_argument("--refresh", type=shlex.split, default=REFRESH, metavar="COMMAND", help="likewise")
    given = parser.parse_args(arguments)
    # The key passes through this memory. A limit of 0 does not bind a core_pattern that is a pipe; this does.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    options = Options(
        root=given.root,
        bus_address=given.bus_address,
        idle_s=given.idle,
        reseal=given.reseal,
        refresh=given.refresh,
    )
    try:
        return asyncio.run(serve(options))
    except AIAssistantError as error:
        logging.error("%s%s", error.message, f" (hint: {error.hint})" if error.hint else "")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
