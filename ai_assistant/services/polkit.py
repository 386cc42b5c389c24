"""The one question to polkit: may whoever sent this call do that?"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from dbus_fast import Variant

from ai_assistant.services.connection import Call, Connection
from ai_assistant.services.wire import BusError

log = logging.getLogger(__name__)

_POLKIT = "org.freedesktop.PolicyKit1"
_DIED = "org.freedesktop.DBus.Error.NoReply"
"""What the bus answers in the place of somebody who left it without an answer."""
_AGAIN_S = 0.5


async def allows(connection: Connection, call: Call, action: str) -> bool:
    """Whether polkit says yes; an action that nobody registered, or no polkit, is never a reason to say yes.

    polkit can be made to crash by somebody else, who leaves the bus while it looks at him. It is started again at the
    next question, so it is asked once more.
    """
    try:
        try:
            return await _ask(connection, call, action)
        except BusError as error:
            if error.name != _DIED:
                raise
            log.warning("polkit died of a question about %s: asking again", action)
        await asyncio.sleep(_AGAIN_S)
        return await _ask(connection, call, action)
    except BusError as error:
        log.warning("polkit cannot answer for %s: %s", action, error)
        return False


async def _ask(connection: Connection, call: Call, action: str) -> bool:
    details: dict[str, Any] = {}
    subject = ("system-bus-name", {"name": Variant("s", call.sender)})
    reply = await connection.wire.call(
        _POLKIT,
        "/org/freedesktop/PolicyKit1/Authority",
        "org.freedesktop.PolicyKit1.Authority",
        "CheckAuthorization",
        "(sa{sv})sa{ss}us",
        [subject, action, details, 1 if call.interactive else 0, ""],
        # A person who types a password needs longer than a program.
        timeout_s=120.0 if call.interactive else 25.0,
    )
    yes, _challenge, _ = reply.body[0]
    return bool(yes)
