"""The network side of the API: what listens, with which certificate, and the endpoints that look after keys."""

from __future__ import annotations

import logging
import os
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ai_assistant.daemon.api import params
from ai_assistant.daemon.api.answers import json_response
from ai_assistant.daemon.api.errors import HttpError
from ai_assistant.daemon.api.exchange import Exchange
from ai_assistant.daemon.api.keys import KeyStore
from ai_assistant.daemon.api.tls import Certificate, certificate, context
from ai_assistant.errors import AIAssistantError, InvalidArgument

log = logging.getLogger(__name__)

_NEW = frozenset({"name", "scopes", "expires_s", "requests_per_minute", "tokens_per_minute"})


@dataclass(slots=True, kw_only=True)
class Network:
    """Sockets that the service manager has opened for the network, if any, and who may come in by them."""

    keys: KeyStore
    sockets: Sequence[socket.socket] = ()
    context: ssl.SSLContext | None = None
    certificate: Certificate | None = None
    problem: str = ""
    """Why nothing is answered although it should be."""
    _listening: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for each in self.sockets:
            address, port = each.getsockname()[:2]
            self._listening.append(f"[{address}]:{port}" if ":" in address else f"{address}:{port}")

    @classmethod
    def open(cls, folder: Path, sockets: Sequence[socket.socket], hostname: str, addresses: Sequence[str]) -> Network:
        """With the keys in `folder`, and the certificate for `sockets`, which is made there if need be.

        A certificate that cannot be used closes the sockets and is told in `problem`: local users are served.
        """
        keys = KeyStore(folder / "api-keys.json")
        if not sockets:
            return cls(keys=keys)
        given = os.environ.get("CREDENTIALS_DIRECTORY")
        try:
            found = certificate(
                folder / "tls", hostname, addresses, credentials=Path(given) if given is not None else None
            )
            return cls(keys=keys, sockets=sockets, context=context(found), certificate=found)
        except (AIAssistantError, OSError) as error:
            problem = error.message if isinstance(error, AIAssistantError) else f"no certificate: {error.strerror}"
            log.error("the network API is not served: %s", problem)
            for each in sockets:
                each.close()
            return cls(keys=keys, problem=problem)

    def state(self) -> dict[str, Any]:
        return {
            "enabled": bool(self.sockets) or bool(self.problem),
            "listening": self._listening,
            "certificate": self.certificate.to_dict() if self.certificate is not None else None,
            "keys": len(self.keys.all()),
            "problem": self.problem,
        }


class NetworkEndpoints:
    def __init__(self, network: Network) -> None:
        self._network = network

    async def state(self, exchange: Exchange) -> None:
        await exchange.respond(json_response(self._network.state()))

    async def keys(self, exchange: Exchange) -> None:
        await exchange.respond(json_response({"data": [each.public() for each in self._network.keys.all()]}))

    async def add(self, exchange: Exchange) -> None:
        body = await exchange.json()
        params.check_names(body, _NEW, frozenset())
        # A file of a few kilobytes, once in a while: not worth a thread.
        key, secret = self._network.keys.add(body)
        await exchange.respond(json_response({**key.public(), "key": secret}, 201, {"cache-control": "no-store"}))

    async def remove(self, exchange: Exchange) -> None:
        found = self._network.keys.remove(exchange.path_params["key"])
        if found is None:
            raise HttpError(404, InvalidArgument("there is no such key", hint="see ai-assistant api key list"))
        await exchange.respond(json_response(found.public()))
