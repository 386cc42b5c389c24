"""A model hub on loopback that speaks the Hugging Face Hub's protocol, and a second host that it redirects to.

The listing has sizes, SHA-256 of files in LFS and git's SHA-1 of the others; ``resolve`` answers with ranges, ETag,
X-Linked-ETag and X-Repo-Commit. Faults are taken in order, one for each request of a file's body.
"""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Seen:
    """A request that came. `host` is "hub" or "store"."""

    host: str
    path: str
    headers: Mapping[str, str]


Fault = Callable[["Handler", bytes], None]
"""Answers a request for these bytes, the whole file, in its own way."""


@dataclass
class Hub:
    """What the two hosts serve; change it while they run.

    Attributes:
        files: content by "owner/name" and path.
        plain: paths that are not in LFS.
        token: what a request to the hub must carry; empty: nothing.
        store: whether bodies come from the other host, by a redirect.
        listing: replaces the answer to a listing.
        lies: SHA-256 that the listing and the headers have instead of the true one, by path.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    plain: set[str] = field(default_factory=set)
    token: str = ""
    store: bool = False
    listing: Any = None
    lies: dict[str, str] = field(default_factory=dict)
    faults: deque[Fault] = field(default_factory=deque)
    listing_faults: deque[Fault] = field(default_factory=deque)
    seen: list[Seen] = field(default_factory=list)
    url: str = ""
    store_url: str = ""

    def sha256(self, path: str, content: bytes) -> str:
        return self.lies.get(path, hashlib.sha256(content).hexdigest())

    def describe(self, repository: str) -> dict[str, Any]:
        """The answer to a listing."""
        siblings = []
        for path, content in self.files[repository].items():
            row: dict[str, Any] = {"rfilename": path, "size": len(content)}
            if path in self.plain:
                row["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            else:
                row["blobId"] = hashlib.sha1(content).hexdigest()  # of the pointer, which nobody here needs
                row["lfs"] = {"sha256": self.sha256(path, content), "size": len(content), "pointerSize": 134}
            siblings.append(row)
        return {"id": repository, "sha": COMMIT, "private": False, "siblings": siblings}

    def bodies(self) -> list[Seen]:
        """The requests for content."""
        return [each for each in self.seen if "/api/" not in each.path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    name = "hub"
    about: Mapping[str, str] = MappingProxyType({})
    """Headers of the file that is asked for."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass

    def do_GET(self) -> None:
        hub = self.hub
        hub.seen.append(Seen(self.name, self.path, dict(self.headers)))
        path = unquote(urlsplit(self.path).path)
        if self.name == "hub" and hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer(401, b"{}")
            return
        if path.startswith("/api/models/"):
            if hub.listing_faults:
                hub.listing_faults.popleft()(self, b"")
                return
            repository, _, _revision = path.removeprefix("/api/models/").partition("/revision/")
            if repository not in hub.files:
                self.answer(404, b'{"error":"Repository not found"}')
                return
            body = hub.listing if hub.listing is not None else hub.describe(repository)
            self.answer(200, body if isinstance(body, bytes) else json.dumps(body).encode())
            return
        repository, _, rest = path[1:].partition("/resolve/")
        name = rest.partition("/")[2]
        content = hub.files.get(repository, {}).get(name)
        if content is None:
            self.answer(404, b"Entry not found")
            return
        self.about = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if self.name == "hub" and hub.store:
            linked = {"X-Linked-ETag": f'"{hub.sha256(name, content)}"', "X-Linked-Size": str(len(content))}
            self.answer(302, b"", {"Location": hub.store_url + self.path, **self.about, **linked})
            return
        if hub.faults:
            hub.faults.popleft()(self, content)
            return
        self.serve(content)

    def serve(self, content: bytes) -> None:
        """As a good server does."""
        begin = self.begin(content)
        if begin is None:
            self.answer(200, content, self.about)
        elif begin >= len(content):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        else:
            known = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}", **self.about}
            self.answer(206, content[begin:], known)

    def begin(self, content: bytes) -> int | None:
        """Where the wanted range begins; None for the whole."""
        wanted = self.headers.get("Range", "")
        condition = self.headers.get("If-Range")
        if not wanted.startswith("bytes=") or (condition and condition != self.about["ETag"]):
            return None
        return int(wanted.removeprefix("bytes=").rstrip("-"))

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.head(status, {"Content-Length": str(len(body)), **(headers or {})})
        self.send(body)

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def send(self, body: bytes) -> None:
        try:
            self.wfile.write(body)
            self.wfile.flush()
        except OSError:
            self.close_connection = True


def drop_after(count: int) -> Fault:
    """So many bytes of what was asked for, and then nothing."""

    def fault(handler: Handler, content: bytes) -> None:
        begin = handler.begin(content)
        rest = content[begin or 0 :]
        headers = {"Content-Length": str(len(rest)), **handler.about}
        if begin is not None:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        handler.head(206 if begin is not None else 200, headers)
        handler.send(rest[:count])
        handler.close_connection = True

    return fault


def status(code: int, headers: Mapping[str, str] | None = None) -> Fault:
    return lambda handler, content: handler.answer(code, b"", headers)


def ignore_range(handler: Handler, content: bytes) -> None:
    handler.answer(200, content, handler.about)


def other_range(handler: Handler, content: bytes) -> None:
    """A part that nobody asked for."""
    headers = {"Content-Range": f"bytes 1-{len(content) - 1}/{len(content)}", **handler.about}
    handler.answer(206, content[1:], headers)


def wrong_length(handler: Handler, content: bytes) -> None:
    handler.answer(200, content[:-1], handler.about)


def endless(handler: Handler, content: bytes) -> None:
    """No length, and no end before the other side hangs up."""
    handler.head(200, {"Transfer-Encoding": "chunked"})
    while not handler.close_connection:
        handler.send(b"10000\r\n" + bytes(65536) + b"\r\n")


def compressed(handler: Handler, content: bytes) -> None:
    handler.answer(200, content, {"Content-Encoding": "gzip", **handler.about})


def drip(handler: Handler, content: bytes) -> None:
    """A byte now and then, faster than any silence and for ever."""
    handler.head(200, {"Content-Length": str(len(content)), **handler.about})
    for index in range(len(content)):
        if handler.close_connection:
            return
        handler.send(content[index : index + 1])
        time.sleep(0.05)


def silence(handler: Handler, content: bytes) -> None:
    """The beginning, and then an open connection."""
    handler.head(200, {"Content-Length": str(len(content)), **handler.about})
    handler.send(content[:1000])
    time.sleep(3)
    handler.close_connection = True


def paced(pieces: int, pause_s: float) -> Fault:
    """All of it, slowly."""

    def fault(handler: Handler, content: bytes) -> None:
        begin = handler.begin(content)
        rest = content[begin or 0 :]
        headers = {"Content-Length": str(len(rest)), **handler.about}
        if begin is not None:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        handler.head(206 if begin is not None else 200, headers)
        step = max(1, len(rest) // pieces)
        for at in range(0, len(rest), step):
            if handler.close_connection:
                return
            handler.send(rest[at : at + step])
            time.sleep(pause_s)

    return fault


def redirect(url: str, code: int = 302) -> Fault:
    return lambda handler, content: handler.answer(code, b"", {"Location": url, "Set-Cookie": "secret=1"})


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # Clients that hang up are what is tested.


@contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[Hub]:
    """Both hosts, on ports of their own."""
    hub = Hub()
    servers = []
    for name in ("hub", "store"):
        handler = type("Bound", (Handler,), {"hub": hub, "name": name})
        server = _Server(("127.0.0.1", 0), handler)
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
    scheme = "https" if tls is not None else "http"
    hub.url, hub.store_url = (f"{scheme}://127.0.0.1:{each.server_address[1]}" for each in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
