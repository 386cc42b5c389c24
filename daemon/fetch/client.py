"""The daemon's side of the fetching process: one connection, one request. What comes back is read as hostile."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ai_assistant.daemon.fetch.source import Source, to_dict
from ai_assistant.daemon.worker import messages
from ai_assistant.daemon.worker.frames import FrameReader, ProtocolError, encode
from ai_assistant.errors import DownloadFailed, ServiceUnavailable

FETCH_SOCKET = Path("/run/ai-assistant/fetch.sock")
MAX_FILES = 64
MAX_EVENT_BYTES = 1 << 20
_RECEIVE = 1 << 16
_TEXTS = {"path": 1024, "url": 8192, "sha256": 64, "git_sha1": 40}


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """As in `hub.RemoteFile`, which only the other process imports."""

    path: str
    url: str
    size_bytes: int
    sha256: str
    git_sha1: str


@dataclass(frozen=True, slots=True)
class Event:
    """Something happens. Bytes are -1 where the event does not say."""

    bytes: int = -1
    checked: int = -1
    total: int = -1
    retry: str = ""
    wait_s: float = 0.0
    validator: str = ""


class Fetcher:
    """Starts a process for each request by connecting to its socket unit.

    Args:
        patience: see `transfer.Patience`; empty: its defaults.
    """

    def __init__(self, path: Path, *, allow_http: bool = False, patience: Mapping[str, float] | None = None) -> None:
        self._path = path
        self._allow_http = allow_http
        self._patience = dict(patience or {})

    async def resolve(self, source: Source, token: str, on_event: Callable[[Event], None]) -> tuple[RemoteFile, ...]:
        """What the source is made of, the model itself first.

        Raises:
            NoSuchModel, NotAuthorized, NotSupported, DownloadFailed, ServiceUnavailable
        """
        found = await self._ask({"op": "resolve", "source": to_dict(source), "token": token}, None, on_event)
        try:
            files = found["files"]
            if not isinstance(files, list) or not 1 <= len(files) <= MAX_FILES:
                raise ValueError
            return tuple(_remote(each) for each in files)
        except (KeyError, TypeError, ValueError):
            raise _strange() from None

    async def get(
        self,
        source: Source,
        file: RemoteFile,
        fd: int,
        on_event: Callable[[Event], None],
        *,
        token: str = "",
        max_bytes: int,
        validator: str = "",
    ) -> int:
        """Fill an open file, which may hold the beginning; the bytes that it has then.

        Cancelling ends the process and leaves what has come.

        Raises:
            NoSuchModel, NotAuthorized, NoSpace, DownloadFailed, ServiceUnavailable
        """
        want = {key: value for key, value in asdict(file).items() if key != "path"}
        message = {"op": "get", "source": to_dict(source), "token": token}
        message["want"] = {**want, "max_bytes": max_bytes, "validator": validator}
        found = await self._ask(message, fd, on_event)
        size = found.get("size_bytes")
        if type(size) is not int or not 0 <= size <= max_bytes:
            raise _strange()
        return size

    async def _ask(
        self, message: dict[str, Any], fd: int | None, on_event: Callable[[Event], None]
    ) -> Mapping[str, Any]:
        loop = asyncio.get_running_loop()
        frame = encode({**message, "allow_http": self._allow_http, "patience": self._patience})
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            try:
                await loop.sock_connect(sock, str(self._path))
                # The descriptor travels with the first byte; a fresh socket has room for at least that.
                sent = socket.send_fds(sock, [frame], [fd] if fd is not None else [])
                await loop.sock_sendall(sock, frame[sent:])
                return await self._events(loop, sock, on_event)
            except OSError as error:
                raise ServiceUnavailable(
                    f"the downloading process cannot be reached: {error.strerror}",
                    hint="see systemctl status ai-assistant-fetch.socket",
                ) from error

    async def _events(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, on_event: Callable[[Event], None]
    ) -> Mapping[str, Any]:
        reader = FrameReader(lambda: MAX_EVENT_BYTES)
        while data := await loop.sock_recv(sock, _RECEIVE):
            try:
                for message in reader.feed(data):
                    kind, value = message.get("event"), message.get("value")
                    if kind == "error":
                        raise messages.error(message)
                    if not isinstance(value, dict):
                        raise ProtocolError("an event without a value")
                    if kind == "result":
                        return value
                    on_event(_event(value))
            except ProtocolError as error:
                raise _strange() from error
        raise DownloadFailed("the downloading process died", hint="run it again: it goes on where it stopped")


def _event(value: Mapping[str, Any]) -> Event:
    if not set(value) <= {each.name for each in fields(Event)}:
        raise ProtocolError("an unknown event")
    for key in ("bytes", "checked", "total"):
        if type(value.get(key, 0)) is not int or not -1 <= value.get(key, 0) < 1 << 60:
            raise ProtocolError("something that is no count")
    wait = value.get("wait_s", 0.0)
    if type(wait) not in (int, float) or not math.isfinite(wait) or wait < 0:
        raise ProtocolError("something that is no time")
    for key in ("retry", "validator"):
        if not isinstance(value.get(key, ""), str) or len(value.get(key, "")) > 600:
            raise ProtocolError("something that is no text")
    return Event(**value)


def _remote(value: Any) -> RemoteFile:
    made = RemoteFile(**value)
    for name, longest in _TEXTS.items():
        text = getattr(made, name)
        if not isinstance(text, str) or len(text) > longest or not text.isprintable():
            raise ValueError(name)
    if type(made.size_bytes) is not int or not -1 <= made.size_bytes < 1 << 60:
        raise ValueError("size_bytes")
    return made


def _strange() -> DownloadFailed:
    return DownloadFailed("the downloading process does not speak the protocol", hint="the journal has its messages")
