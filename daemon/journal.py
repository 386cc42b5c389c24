"""The journal: our messages into it with structured fields, and the last lines of our units out of it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from datetime import UTC, datetime

from ai_assistant.errors import NotSupported

PRIORITIES = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
UNITS = ("ai-assistant*",)
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_MAX_LINE = 4000
_TIMEOUT_S = 20.0


def set_up(level: str) -> None:
    """Log to the journal when started by systemd, with fields from `extra`; otherwise to standard error."""
    handler: logging.Handler | None = None
    if "JOURNAL_STREAM" in os.environ:
        try:
            from systemd.journal import JournalHandler

            handler = JournalHandler(SYSLOG_IDENTIFIER="ai-assistantd")
        except (ImportError, OSError):
            handler = None
    if handler is None:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(_LEVELS[level])


async def read_log(lines: int, priority: str) -> list[str]:
    """The newest `lines` of our units at `priority` or worse, oldest first: time (UTC), unit, message.

    Raises:
        NotSupported: no journal here, or no right to read it.
    """
    arguments = [f"--unit={unit}" for unit in UNITS]
    try:
        child = await asyncio.create_subprocess_exec(
            "journalctl",
            *arguments,
            f"--lines={lines}",
            f"--priority={priority}",
            "--output=json",
            "--output-fields=MESSAGE,_SYSTEMD_UNIT,UNIT",
            "--no-pager",
            "--quiet",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as error:
        raise NotSupported(f"the journal cannot be read: {error.strerror}") from error
    try:
        out, _ = await asyncio.wait_for(child.communicate(), _TIMEOUT_S)
    except TimeoutError:
        raise NotSupported("the journal does not answer") from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0:
        raise NotSupported("there is no journal that this service may read")
    return [_line(each) for each in out.splitlines() if each]


def _line(raw: bytes) -> str:
    values = json.loads(raw)
    when = datetime.fromtimestamp(int(values.get("__REALTIME_TIMESTAMP", 0)) / 1e6, UTC)
    unit = values.get("UNIT") or values.get("_SYSTEMD_UNIT") or "-"
    message = values.get("MESSAGE")
    if isinstance(message, list):
        # Not UTF-8, and therefore given as numbers.
        message = bytes(message).decode(errors="replace")
    text = str(message or "").replace("\0", "\ufffd")[:_MAX_LINE]
    return f"{when:%Y-%m-%d %H:%M:%S} {unit} {text}"
