"""The checks of `ai-assistant doctor`: each looks at one thing and says what it found."""

from __future__ import annotations

import asyncio
import grp
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ai_assistant._transport import GROUP_HINT, socket_path
from ai_assistant.cli.output import size
from ai_assistant.cli.status import protection
from ai_assistant.cli.storage import SHOW_KEY
from ai_assistant.client import Client
from ai_assistant.errors import AIAssistantError, ServiceUnavailable
from ai_assistant.hal import meminfo

USERS, ADMINS = "ai-assistant", "ai-assistant-admin"
ACTIONS = frozenset(
    f"org.ai-assistant1.{each}" for each in ("infer", "load", "import", "unload", "remove", "recovery-key", "reseal")
)
STATE_DIRECTORY = Path("/var/lib/ai-assistant")
LEAST_DISK_BYTES = 512 * 1024 * 1024
LEAST_MEMORY_BYTES = 256 * 1024 * 1024
_TIMEOUT_S = 20.0

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    state: State
    detail: str
    hint: str = ""


def run(check: Callable[[], Result]) -> Result:
    """The check's result; an error of the product is a failed check, and so is a defect in the check."""
    name = check.__name__
    try:
        return check()
    except AIAssistantError as error:
        return Result(name, "failed", error.message, error.hint)
    except Exception as error:
        return Result(name, "failed", f"{type(error).__name__}: {error}", "run it with --debug")


def bus() -> Result:
    with Client() as client:
        status = client.status()
    state, version = status["state"], status["version"]
    if state != "running":
        return Result("bus", "warning", f"the daemon ({version}) is {state}", "see journalctl -u ai-assistantd")
    return Result("bus", "ok", f"the daemon ({version}) is running")


def api() -> Result:
    with Client(timeout=_TIMEOUT_S) as client:
        client.health()
        models = client.served_models()
    hint = "import a model: ai-assistant model import FILE"
    if not models:
        return Result("api", "warning", f"{socket_path()} answers, but there is no model", hint)
    return Result("api", "ok", f"{socket_path()} answers, with {len(models)} models")


def polkit() -> Result:
    try:
        found = asyncio.run(_polkit_actions())
    except ServiceUnavailable:
        hint = "without it only root may change anything: systemctl start polkit"
        return Result("polkit", "failed", "polkit does not answer on the bus", hint)
    missing = sorted(ACTIONS - found)
    if missing:
        hint = "without them only root may change anything: is the package's .policy file in place?"
        return Result("polkit", "failed", f"it does not know {', '.join(missing)}", hint)
    return Result("polkit", "ok", "all actions are known")


async def _polkit_actions() -> set[str]:
    from ai_assistant._bus import Bus

    connection = await Bus.connect()
    try:
        rows: Any = await connection.call(
            "EnumerateActions",
            "s",
            "",
            path="/org/freedesktop/PolicyKit1/Authority",
            interface="org.freedesktop.PolicyKit1.Authority",
            destination="org.freedesktop.PolicyKit1",
        )
        return {row[0] for row in rows[0]}
    finally:
        connection.close()


def groups() -> Result:
    if os.geteuid() == 0:
        return Result("groups", "ok", "you are root and may do everything")
    names = {_group_name(number) for number in {*os.getgroups(), os.getegid()}}
    if ADMINS in names:
        return Result("groups", "ok", f"you are in {ADMINS} and may do everything")
    if USERS in names:
        return Result("groups", "ok", f"you are in {USERS} and may use and load models")
    return Result("groups", "failed", f"you are in neither {USERS} nor {ADMINS}, and may only look", GROUP_HINT)


def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def disk() -> Result:
    place = next(each for each in (STATE_DIRECTORY, *STATE_DIRECTORY.parents) if each.exists())
    free = shutil.disk_usage(place).free
    detail = f"{size(free)} free for models"
    if free < LEAST_DISK_BYTES:
        return Result("disk", "failed", detail, "remove models: ai-assistant model list, then model remove")
    return Result("disk", "ok", detail)


def storage() -> Result:
    """What is not protected is a warning: the machine works, and its owner should know."""
    with Client() as client:
        status = client.status()
    found = protection(status)
    if status["recovery_key_pending"]:
        return Result("storage", "warning", f"{found.sentence()}; its recovery key is not written down", SHOW_KEY)
    if found.encryption != "tpm2" or found.secure_boot != "on":
        hint = "whoever has the machine in hand may be able to read its disk: see ai-assistant storage"
        return Result("storage", "warning", found.sentence(), hint)
    return Result("storage", "ok", found.sentence())


def memory() -> Result:
    total, available = (each or 0 for each in meminfo.memory())
    detail = f"{size(available)} of {size(total)} available"
    if available < LEAST_MEMORY_BYTES:
        return Result("memory", "failed", detail, "unload a model: ai-assistant model unload MODEL")
    return Result("memory", "ok", detail)


def devices() -> Result:
    """GPUs and NPUs that are there and do not work: the machine serves without them, only slower."""
    from ai_assistant.hal.device import DeviceKind

    with Client() as client:
        known = client.devices()
    # A display controller that cannot compute is nobody's loss.
    kinds = (DeviceKind.GPU, DeviceKind.NPU)
    found = [each for each in known if each.kind in kinds and each.attributes.get("compute", True)]
    broken = [each for each in found if not each.usable]
    if broken:
        first, more = broken[0], f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        return Result("devices", "warning", f"{first.name} is there, but: {first.state}{more}", first.hint)
    names = ", ".join(each.name for each in found) or "no GPU or NPU"
    return Result("devices", "ok", names)


def units() -> Result:
    """Failed units of ours are a failure, those of others a warning."""
    command = ["systemctl", "list-units", "--failed", "--plain", "--no-legend", "--no-pager"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        return Result("units", "warning", "there is no systemctl here, so units were not looked at")
    if done.returncode != 0:
        return Result("units", "warning", f"systemctl says: {(done.stderr.strip() or '?').splitlines()[0]}")
    failed = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    ours = [name for name in failed if name.startswith("ai-assistant")]
    if ours:
        return Result("units", "failed", f"failed: {', '.join(ours)}", f"see systemctl status {ours[0]}")
    if failed:
        return Result("units", "warning", f"failed: {', '.join(failed)}", f"see systemctl status {failed[0]}")
    return Result("units", "ok", "none has failed")


def configuration() -> Result:
    from ai_assistant.cli.config import explained

    rows = explained(Path("/"))
    changed = sum(1 for _, _, source in rows if source != "default" and not source.startswith("/usr/"))
    return Result("configuration", "ok", f"{len(rows)} settings, {changed} of them set on this machine")


def engine() -> Result:
    """Imported in a process of its own: a library that does not fit this processor kills who loads it."""
    if importlib.util.find_spec("llama_cpp") is None:
        hint = "only needed where there is no daemon: pip install 'ai-assistant[local]'"
        return Result("engine", "warning", "llama.cpp is not installed for this Python", hint)
    program = "import llama_cpp, ai_assistant.engines.llama; print(llama_cpp.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"it died with status {done.returncode}"])[-1]
        return Result("engine", "failed", last, "the image or the installation is incomplete")
    return Result("engine", "ok", f"llama-cpp-python {done.stdout.strip()}")


CHECKS: tuple[Callable[[], Result], ...] = (
    bus,
    api,
    polkit,
    groups,
    disk,
    storage,
    memory,
    devices,
    units,
    configuration,
    engine,
)
