"""`ai-assistant banner`: what a person in front of the machine sees above the login.

The image writes this to /run/issue.d at boot. So it must be quick and must never fail: what cannot be
found out is left out, and a daemon that is not up yet is said to be starting.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ai_assistant
from ai_assistant.errors import AIAssistantError, InvalidRecoveryKey
from ai_assistant.tee import storage

TIMEOUT_S = 3.0
DEVELOPER = "developer"
_WIDTH = 79
_SHOW_KEY = "ai-assistant storage recovery-key"
_SIOCGIFADDR = 0x8915


def banner() -> None:
    """Print the console banner."""
    run()


def run() -> int:
    print(text(Path("/"), _status()), end="")
    return 0


def text(root: Path, status: Mapping[str, Any] | None) -> str:
    """The banner, out of the daemon's status if it has one, and of what is found below `root`."""
    known = status or {}
    lines = [f"AI Assistant OS {known.get('version') or ai_assistant.__version__}", ""]
    lines.append(f"  address  {', '.join(known.get('addresses') or addresses()) or 'no network yet'}")
    lines.append(f"  state    {known.get('state') or 'the daemon is not up yet'}")
    if status is not None:
        lines.append(f"  model    {_models(known)}")
        lines.append(f"  power    {_watts(known)}")
    lines += _wrapped(f"  storage  {storage.read(root).sentence()}", 11)
    lines += recovery_key(root)
    developer = profile(root) == DEVELOPER
    account = f" as {DEVELOPER}" if developer else ""
    lines += ["", f"  Log in{account}, then type one of"]
    lines += ['    ai-assistant ask "how warm is it?"', "    ai-assistant --help"]
    if developer and without_password(root, DEVELOPER):
        lines.append("")
        lines.append(f"  WARNING: the account {DEVELOPER} has no password, so whoever sits here is in.")
        lines.append("  Set one with passwd; until then no SSH server runs.")
    # getty expands backslashes in this text, and nothing in it means to.
    return "\n".join(lines).replace("\\", "/") + "\n\n"


def recovery_key(root: Path) -> list[str]:
    """While a recovery key waits to be written down: the key for root, who alone may read it; else how to see it."""
    from ai_assistant.tee.vault.recovery import Recovery

    try:
        key = Recovery(root).key()
    except InvalidRecoveryKey as error:
        return ["", *_wrapped(f"  WARNING: {error.message}.", 2), *_wrapped(f"  Please {error.hint}.", 2)]
    except AIAssistantError:
        if not storage.pending(root):
            return []
        return ["", "  RECOVERY KEY: one waits to be written down. An administrator sees it with", f"    {_SHOW_KEY}"]
    return [
        "",
        "  RECOVERY KEY: write it down now and keep it away from this machine. It opens",
        "  the storage when the TPM does not, as after a change of firmware.",
        "",
        f"    {key}",
        "",
        "  It is shown here until you say that you have it:",
        "    ai-assistant storage acknowledge",
    ]


def _wrapped(line: str, indent: int) -> list[str]:
    """A long line as lines of a console, indented from the second on."""
    return textwrap.wrap(line, _WIDTH, subsequent_indent=" " * indent)


def _models(status: Mapping[str, Any]) -> str:
    models = [each for each in status.get("models") or () if isinstance(each, Mapping)]
    if not models:
        return "none"
    shown = next((each for each in models if each.get("state") == "loaded"), models[0])
    others = f" and {len(models) - 1} more" if len(models) > 1 else ""
    return f"{shown.get('name')} ({shown.get('state')}){others}"


def _watts(status: Mapping[str, Any]) -> str:
    value = status.get("watts")
    if isinstance(value, int | float):
        return f"{value:.1f} W"
    return "no sensor" if status.get("watts_source") in (None, "none") else "not measured yet"


def _status() -> dict[str, Any] | None:
    try:
        return asyncio.run(_asked())
    except Exception:  # whatever it is, a banner with less in it is better than none
        return None


async def _asked() -> dict[str, Any]:
    from ai_assistant._manager import Manager

    manager = Manager(None)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await manager.status()
    finally:
        await manager.close()


def profile(root: Path) -> str:
    """developer, production or test, as the image says; empty elsewhere."""
    try:
        return (root / "usr/lib/ai-assistant/profile").read_text(errors="replace").strip()
    except OSError:
        return ""


def without_password(root: Path, user: str) -> bool:
    """Whether `user` can log in with an empty password; False when /etc/shadow may not be read."""
    try:
        lines = (root / "etc/shadow").read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.split(":")[:2] == [user, ""] for line in lines)


def addresses() -> list[str]:
    """This machine's IPv4 addresses, from the kernel; without the loopback's."""
    found: list[str] = []
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                try:
                    answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", os.fsencode(name)[:15]))
                except OSError:
                    continue  # this one has no address
                found.append(socket.inet_ntoa(answer[20:24]))
    except OSError:
        return found
    return [each for each in found if not each.startswith("127.")]
