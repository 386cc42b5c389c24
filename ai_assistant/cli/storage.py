"""`ai-assistant storage …`: how the storage is protected, and the key that opens it when the TPM does not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import typer

from ai_assistant.cli.group import Command
from ai_assistant.cli.options import Debug, Json, Yes, require_terminal
from ai_assistant.cli.output import Output
from ai_assistant.errors import InvalidArgument

T = TypeVar("T")

_TRIES = 3
SHOW_KEY = "ai-assistant storage recovery-key"
HELP = """Show how the storage is protected, and look after its recovery key.

Encrypted or not and why, what opened it, whether a recovery key waits to be written down, Secure Boot.

\b
Examples:
  ai-assistant storage
  ai-assistant storage --json | jq -r .encryption
  ai-assistant storage recovery-key
"""

app = typer.Typer(help=HELP, invoke_without_command=True, rich_markup_mode=None)


def _vault(ask: Callable[[Any], Awaitable[T]]) -> T:
    from ai_assistant._vault import Vault

    async def asked() -> T:
        async with Vault() as vault:
            return await ask(vault)

    return asyncio.run(asked())


@app.callback()
def show(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    if context.invoked_subcommand is not None:
        return
    out: Output = context.obj
    found = _vault(lambda vault: vault.properties())
    if out.json:
        out.document(
            {
                "encryption": found.get("StorageEncryption"),
                "reason": found.get("StorageReason"),
                "opened_by": found.get("OpenedBy"),
                "recovery_key_pending": found.get("RecoveryKeyPending"),
                "secure_boot": found.get("SecureBoot"),
                "tpm": found.get("HasTPM"),
            }
        )
    else:
        out.fields(described(found))


def described(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The vault's properties as name and value, for people."""
    from ai_assistant.tee import storage

    state = storage.told(
        *(found.get(each) for each in ("StorageEncryption", "StorageReason", "OpenedBy", "SecureBoot"))
    )
    waits = f"waits to be written down: {SHOW_KEY}"
    return [
        ("storage", state.sentence()),
        ("recovery key", waits if found.get("RecoveryKeyPending") else "none waits to be written down"),
        ("Secure Boot", state.secure_boot_sentence()),
        ("TPM", "yes" if found.get("HasTPM") else "none that could be used"),
    ]


@app.command("recovery-key", cls=Command)
def recovery_key(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """Show the recovery key, until it is acknowledged. For administrators.

    It opens the storage when the TPM does not, as after a change of firmware or of Secure Boot's keys. Write it down,
    keep it away from this machine, and then say so: ai-assistant storage acknowledge.

    \b
    Examples:
      ai-assistant storage recovery-key
    """
    out: Output = context.obj
    key = _vault(lambda vault: vault.recovery_key())
    if out.json:
        out.document({"recovery_key": key})
        return
    out.line(key)
    out.note("Write it down and keep it away from this machine, then: ai-assistant storage acknowledge")


@app.command("acknowledge", cls=Command)
def acknowledge(context: typer.Context, yes: Yes = False, json: Json = False, debug: Debug = False) -> None:
    """Say that the recovery key is written down. It is never shown again.

    Asks for the last eight letters of what you wrote, unless you say --yes. For administrators.

    \b
    Examples:
      ai-assistant storage acknowledge
      ai-assistant storage acknowledge --yes
    """
    out: Output = context.obj
    if not yes:
        require_terminal(out)
        _compare(_vault(lambda vault: vault.recovery_key()))
    _vault(lambda vault: vault.acknowledge())
    if out.json:
        out.document({"acknowledged": True})
    else:
        out.line("acknowledged: the recovery key is not shown any more")


def _compare(key: str) -> None:
    last = key.rpartition("-")[2]
    for tries_left in reversed(range(_TRIES)):
        typed: str = typer.prompt("The last eight letters of the recovery key, as you wrote them down", err=True)
        if typed.strip().lower().rpartition("-")[2] == last:
            return
        if tries_left:
            typer.echo("That is not how it ends.", err=True)
    raise InvalidArgument(
        "that is not how the recovery key ends, so it is still shown", hint=f"compare with {SHOW_KEY}"
    )


@app.command("reseal", cls=Command)
def reseal(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """Bind the storage to the TPM anew, as the machine is now. For administrators.

    For a machine whose storage the recovery key had to open, because its firmware or Secure Boot's keys have changed
    and you know why. From the next boot on the TPM opens it again.

    \b
    Examples:
      ai-assistant storage reseal
    """
    out: Output = context.obj
    _vault(lambda vault: vault.reseal())
    if out.json:
        out.document({"resealed": True})
    else:
        out.line("the storage is bound to the TPM as the machine is now")
