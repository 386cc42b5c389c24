"""What org.ai_assistant1.Vault can be asked, as coroutines."""

from __future__ import annotations

from typing import Any

from ai_assistant._bus import Bus
from ai_assistant.errors import ServiceUnavailable

NAME = "org.ai_assistant1.Vault"
PATH = "/org/ai_assistant1/vault"
_RESEAL_TIMEOUT_S = 360.0


class Vault:
    """An asynchronous context manager: one connection to the bus."""

    def __init__(self, address: str | None = None) -> None:
        self._address = address

    async def __aenter__(self) -> Vault:
        self._bus = await Bus.connect(self._address)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._bus.close()

    async def properties(self) -> dict[str, Any]:
        """All properties, by their names in the XML."""
        values = await self._call("GetAll", "s", NAME, interface="org.freedesktop.DBus.Properties")
        return dict(values[0])

    async def recovery_key(self) -> str:
        """Raises NoRecoveryKey, InvalidRecoveryKey, NotAuthorized."""
        return str((await self._call("GetRecoveryKey"))[0])

    async def acknowledge(self) -> None:
        """Raises NoRecoveryKey, InvalidRecoveryKey, NoSpace, NotAuthorized."""
        await self._call("AcknowledgeRecoveryKey")

    async def reseal(self) -> None:
        """Raises ResealFailed, Busy, NotAuthorized."""
        await self._call("Reseal", timeout_s=_RESEAL_TIMEOUT_S)

    async def _call(self, member: str, signature: str = "", *body: Any, **more: Any) -> list[Any]:
        call = {"path": PATH, "interface": NAME, "destination": NAME, **more}
        try:
            return await self._bus.call(member, signature, *body, **call)
        except ServiceUnavailable as error:
            raise ServiceUnavailable(
                "the vault cannot be reached", hint="see journalctl -u ai-assistant-vaultd, on the appliance"
            ) from error
