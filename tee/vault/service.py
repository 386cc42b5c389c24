"""The vault on the bus: who may see the recovery key, who may acknowledge it, and binding the storage anew.

The process has no capabilities and sees no device. What needs them, binding to the TPM, runs in a unit of its own that
`systemd-run` starts; its output comes back through a pipe.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ai_assistant.errors import Busy, NotAuthorized, ResealFailed
from ai_assistant.services import polkit
from ai_assistant.services.connection import Call, Connection
from ai_assistant.services.notify import keep_alive, notify, watchdog_interval
from ai_assistant.services.wire import BusError
from ai_assistant.tee import storage, vault
from ai_assistant.tee.vault.recovery import Recovery, redacted

log = logging.getLogger(__name__)

_RESEAL_TIMEOUT_S = 300
_TAIL_BYTES = 4096
_MAX_SAID = 600
RESEAL = (
    *("systemd-run", "--quiet", "--wait", "--pipe", "--collect", "--service-type=exec"),
    *("--unit=ai-assistant-reseal", "--description=Bind the storage to the TPM anew"),
    # The tool may hold a key, so no core; and it ends even when nobody waits for it any more.
    *("--property=LimitCORE=0", f"--property=RuntimeMaxSec={_RESEAL_TIMEOUT_S}"),
    *("--setenv=PYTHONPATH=/usr/lib/ai-assistant/python", "--setenv=LANG=C.UTF-8"),
    *("/usr/bin/python3", "-P", "-m", "ai_assistant.provisioning.storage", "reseal"),
)
REFRESH = ("systemctl", "--no-block", "restart", "ai-assistant-banner.service")
"""The console shows the key until it is acknowledged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Where things are; the defaults are those of the appliance."""

    root: Path = Path("/")
    bus_address: str = ""
    """Empty: the system bus."""
    idle_s: float = 30.0
    """It leaves after so long without a call."""
    reseal: Sequence[str] = RESEAL
    refresh: Sequence[str] = REFRESH


class Vault:
    """Answers org.ai_assistant1.Vault."""

    def __init__(self, connection: Connection, options: Options) -> None:
        self._connection = connection
        self._options = options
        self._recovery = Recovery(options.root)
        self._recovery.tidy()
        self._resealing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """Whether something goes on that no caller need wait for."""
        return bool(self._tasks)

    def properties(self) -> Mapping[str, Any]:
        found = storage.read(self._options.root)
        return {
            "StorageEncryption": str(found.encryption),
            "StorageReason": found.reason,
            "OpenedBy": found.opened_by,
            "RecoveryKeyPending": self._recovery.pending(),
            "SecureBoot": str(found.secure_boot),
            "HasTPM": found.tpm,
        }

    async def get_recovery_key(self, call: Call) -> str:
        uid = await self._require(call, "recovery-key")
        key = self._recovery.key()
        log.info("the recovery key was shown to user %d", uid)
        return key

    async def acknowledge_recovery_key(self, call: Call) -> None:
        uid = await self._require(call, "recovery-key")
        # Not in a thread: of two callers one is first, and the other finds nothing that waits.
        self._recovery.acknowledge()
        log.info("user %d has acknowledged the recovery key", uid)
        self._connection.changed(vault.PATH, vault.INTERFACE)
        self._start(self._refresh())

    async def reseal(self, call: Call) -> None:
        uid = await self._require(call, "reseal")
        if self._resealing is not None and not self._resealing.done():
            raise Busy("the storage is being bound to the TPM already", hint="wait for that to end")
        log.info("user %d binds the storage to the TPM anew", uid)
        self._resealing = self._start(self._reseal())
        # Half-way is no place to stop, so it goes on when the caller leaves.
        await asyncio.shield(self._resealing)

    async def _require(self, call: Call, action: str) -> int:
        try:
            uid = int((await self._connection.credentials(call.sender))["UnixUserID"])
        except (BusError, KeyError) as error:
            raise NotAuthorized("the caller has left the bus") from error
        if uid != 0 and not await polkit.allows(self._connection, call, f"org.ai-assistant1.{action}"):
            log.info("denied %s to user %d", action, uid)
            raise NotAuthorized(f"not allowed: {action}", hint="ask for membership in the group ai-assistant-admin")
        return uid

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("for whoever asked, if still there: %s", error)

    async def _reseal(self) -> None:
        status, said = await _run(self._options.reseal, _RESEAL_TIMEOUT_S + 30)
        if status != 0:
            said = redacted(said)
            log.warning("reseal ended with status %d: %s", status, said)
            if "Traceback (most recent call last)" in said:
                # A defect of the tool: what it is, and the rest is in the journal.
                said = said.splitlines()[-1]
            message, _, hint = said.partition("\n  hint: ")
            raise ResealFailed(
                _line(message) or f"the tool ended with status {status} and said nothing",
                hint=_line(hint) or "see journalctl -u ai-assistant-vaultd",
            )

    async def _refresh(self) -> None:
        status, said = await _run(self._options.refresh, 30)
        if status != 0:
            log.warning("the console may still show the old text: %s", _line(said))


def _line(text: str) -> str:
    """The end of a tool's text on one line, without what steers terminals."""
    line = " ".join(text.split())
    line = "".join(each if each.isprintable() else "\ufffd" for each in line)
    return line if len(line) <= _MAX_SAID else "…" + line[-_MAX_SAID:]


async def _run(command: Sequence[str], timeout_s: float) -> tuple[int, str]:
    """Exit status and the end of the output of a command; 127 when it cannot be started, 124 when it takes too long."""
    try:
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        return 127, f"cannot run {command[0]}: {error.strerror}"
    assert child.stdout is not None
    tail = b""
    try:
        async with asyncio.timeout(timeout_s):
            while piece := await child.stdout.read(_TAIL_BYTES):
                tail = (tail + piece)[-_TAIL_BYTES:]
            return await child.wait(), tail.decode(errors="replace").strip()
    except TimeoutError:
        return 124, f"{command[0]} did not end in {timeout_s:g} s"
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def serve(options: Options) -> int:
    """Answer until nobody asks any more, or the service manager says stop; the exit status.

    Raises:
        AIAssistantError: it could not start.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    interval = watchdog_interval()
    watchdog = loop.create_task(keep_alive(interval)) if interval else None
    connection = Connection([vault.load()], calls_per_caller=16)
    await connection.connect(options.bus_address)
    handler = Vault(connection, options)
    connection.export(vault.PATH, {vault.INTERFACE: handler})
    await connection.own_name(vault.BUS_NAME)
    connection.lost.add_done_callback(lambda _: stop.set())
    while not stop.is_set() and (handler.busy or connection.quiet_s < options.idle_s):
        wait_s = max(0.1, options.idle_s - connection.quiet_s)
        try:
            async with asyncio.timeout(wait_s):
                await stop.wait()
        except TimeoutError:
            continue
    status = 1 if connection.lost.done() else 0
    if not stop.is_set():
        # From here on the bus and systemd start the next instance for the next call, and none is lost.
        notify("STOPPING=1")
        await connection.release_name(vault.BUS_NAME)
    await connection.close()
    if watchdog is not None:
        watchdog.cancel()
    return status
