"""Who may do what: polkit for callers on the bus, groups for peers of a socket. Same table for both.

==========================  ==============  ======================  ==============================
                            any local user  group ``ai-assistant``  ``ai-assistant-admin`` or root
==========================  ==============  ======================  ==============================
read                        yes             yes                     yes
infer, load                 no              yes                     yes
import, unload              no              no                      yes
remove, network-api         no              no                      yes
==========================  ==============  ======================  ==============================

On the bus the polkit rules of this package say the same, and an administrator can change them there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ai_assistant.daemon.contract import Peer, Scope, caller
from ai_assistant.errors import NotAuthorized
from ai_assistant.services import polkit
from ai_assistant.services.connection import Call, Connection
from ai_assistant.services.wire import BusError

log = logging.getLogger(__name__)

USER_GROUP = "ai-assistant"
ADMIN_GROUP = "ai-assistant-admin"
USER_SCOPES = frozenset({Scope.READ, Scope.INFER, Scope.LOAD})
_GROUP_TTL_S = 30.0
_groups: dict[str, tuple[float, int | None]] = {}


def _group_id(name: str) -> int | None:
    known = _groups.get(name)
    now = time.monotonic()
    if known is not None and now - known[0] < _GROUP_TTL_S:
        return known[1]
    import grp

    try:
        found: int | None = grp.getgrnam(name).gr_gid
    except KeyError:
        found = None
    _groups[name] = (now, found)
    return found


def allowed(peer: Peer, scope: Scope, *, group_id: Callable[[str], int | None] = _group_id) -> bool:
    """Whether the peer of a local socket may do that, by its groups."""
    if scope is Scope.READ or peer.uid == 0:
        return True
    groups = peer.groups | {peer.gid}
    if group_id(ADMIN_GROUP) in groups:
        return True
    return scope in USER_SCOPES and group_id(USER_GROUP) in groups


class Authority:
    """Asks polkit about callers on the bus; without polkit only root may change anything."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def uid(self, sender: str) -> int:
        """User of a bus connection, who from now on is the `caller` of this task.

        Raises:
            NotAuthorized: it has left.
        """
        try:
            uid = int((await self._connection.credentials(sender))["UnixUserID"])
        except (BusError, KeyError) as error:
            raise NotAuthorized("the caller has left the bus") from error
        caller.set(uid)
        return uid

    async def require(self, call: Call, scope: Scope) -> int:
        """Return the caller's user id if it may do that.

        Raises:
            NotAuthorized
        """
        uid = await self.uid(call.sender)
        if scope is Scope.READ or uid == 0:
            return uid
        action = f"org.ai-assistant1.{scope}"
        if not await polkit.allows(self._connection, call, action):
            log.info("denied %s to uid %d", action, uid, extra={"DBUS_SENDER": call.sender})
            raise NotAuthorized(
                f"not allowed: {scope}",
                hint=f"ask for membership in the group {USER_GROUP if scope in USER_SCOPES else ADMIN_GROUP}",
            )
        return uid
