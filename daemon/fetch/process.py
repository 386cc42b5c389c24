"""What the fetching process does: one request of the daemon, answered over the socket that it came by.

The daemon sends one frame, ``{"op": "resolve", …}`` or ``{"op": "get", …}``, the latter with the descriptor of the file
to fill. Events come back: ``progress``, then ``result`` or ``error``. When the daemon closes its end, the process ends;
what it has written stays. The token is in the request alone: not in an argument, the
environment or a log.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

from ai_assistant.daemon.fetch import hub
from ai_assistant.daemon.fetch.source import HubSource, Source, from_dict
from ai_assistant.daemon.fetch.transfer import Patience, Want, transfer
from ai_assistant.daemon.fetch.web import TryAgain, Web
from ai_assistant.daemon.worker.frames import FrameReader, ProtocolError, encode
from ai_assistant.errors import AIAssistantError, InternalError, InvalidArgument

MAX_REQUEST = 1 << 20


class FetchProcess:
    """Serves one connection.

    Args:
        sock: connected to the daemon.
        leave: ends the process when the daemon has gone.
    """

    def __init__(self, sock: socket.socket, leave: Callable[[int], None] = os._exit) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._leave = leave
        self._done = False

    def serve(self) -> None:
        """Read the request and answer it.

        Raises:
            ProtocolError: the daemon does not speak the protocol.
        """
        message, fds = self._receive()
        if message is None:
            return
        watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        watcher.start()
        try:
            self._send({"event": "result", "value": self._answer(message, fds)})
        except AIAssistantError as error:
            self._send({"event": "error", **error.to_dict()})
        except MemoryError:
            self._send({"event": "error", **InternalError("the process has no memory left").to_dict()})
        finally:
            self._done = True
            for fd in fds:
                os.close(fd)

    def _receive(self) -> tuple[dict[str, Any] | None, list[int]]:
        reader = FrameReader(lambda: MAX_REQUEST)
        kept: list[int] = []
        while True:
            data, fds, _flags, _address = socket.recv_fds(self._sock, 1 << 16, 4, socket.MSG_CMSG_CLOEXEC)
            kept += fds
            if not data:
                return None, kept
            for message in reader.feed(data):
                return message, kept

    def _watch(self) -> None:
        """The daemon says no more: what comes is its end, which is a cancellation."""
        try:
            data = self._sock.recv(1)
        except OSError:
            data = b""
        if not self._done:
            self._leave(1 if data else 0)

    def _send(self, message: Mapping[str, Any]) -> None:
        try:
            self._sock.sendall(encode(message))
        except OSError:
            self._leave(0)

    def _progress(self, values: Mapping[str, Any]) -> None:
        self._send({"event": "progress", "value": dict(values)})

    def _answer(self, message: Mapping[str, Any], fds: list[int]) -> Any:
        token, allow_http = message.get("token", ""), message.get("allow_http", False)
        if not isinstance(token, str) or not isinstance(allow_http, bool):
            raise InvalidArgument("a request with a strange token or permission")
        source = from_dict(message.get("source"), allow_http=allow_http)
        patience = Patience(**_numbers(message.get("patience"), Patience))
        web = Web(source.origin, token=token, allow_http=allow_http, silence_s=patience.stall_s)
        try:
            if message.get("op") == "resolve" and not fds:
                return self._resolve(web, source, patience)
            if message.get("op") == "get" and len(fds) == 1:
                return self._get(web, message.get("want"), fds[0], patience)
        finally:
            web.close()
        raise InvalidArgument("a request that is none")

    def _resolve(self, web: Web, source: Source, patience: Patience) -> dict[str, Any]:
        """What the source is made of, the model itself first."""
        if not isinstance(source, HubSource):
            return {"revision": "", "files": [asdict(hub.RemoteFile(_name_in(source.url), source.url))]}
        listing = self._patient(lambda: web.json(source.listing_url + "?blobs=true"), patience)
        revision, files = hub.parse_listing(listing, source)
        chosen = hub.choose(files, source.selector, f"{source.owner}/{source.repository}")
        return {"revision": revision, "files": [asdict(each) for each in chosen]}

    def _patient(self, work: Callable[[], Any], patience: Patience) -> Any:
        failures = 0
        while True:
            try:
                return work()
            except TryAgain as again:
                failures += 1
                asked = again.after_s or 0.0
                if failures >= min(patience.attempts, 4) or asked > patience.longest_ask_s:
                    raise again.error from again
                wait = max(min(patience.first_wait_s * 2 ** (failures - 1), patience.longest_wait_s), asked)
                self._progress({"retry": again.error.message, "wait_s": round(wait, 1)})
                time.sleep(wait)

    def _get(self, web: Web, values: Any, fd: int, patience: Patience) -> dict[str, Any]:
        if not isinstance(values, Mapping) or not isinstance(values.get("url"), str):
            raise InvalidArgument("a request for no file")
        try:
            want = Want(**values)
        except TypeError as error:
            raise InvalidArgument(f"a request for no file: {error}") from None
        # Whatever happens to this process, it cannot fill the disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (want.max_bytes, want.max_bytes))
        return asdict(transfer(web, want, fd, self._progress, patience))


def _name_in(url: str) -> str:
    """A file's name out of a URL, for people and as the beginning of a model's name."""
    from urllib.parse import unquote, urlsplit

    name = unquote(urlsplit(url).path).rpartition("/")[2]
    return "".join(each for each in name if each.isprintable() and each != "\\")[:200] or "model"


def _numbers(values: Any, kind: type) -> dict[str, Any]:
    if values is None:
        return {}
    known = {each.name for each in fields(kind)}
    if not isinstance(values, Mapping) or not set(values) <= known:
        raise InvalidArgument("strange numbers")
    if not all(type(each) in (int, float) and each >= 0 for each in values.values()):
        raise InvalidArgument("strange numbers")
    return dict(values)


__all__ = ["FetchProcess", "ProtocolError"]
