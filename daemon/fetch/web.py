"""HTTP for the fetching process: redirects followed by our rules, and every failure a named error.

The library is httpx; what it would do by itself and must not here is turned off: proxies and passwords from the
environment, cookies, decompression, following redirects with the credentials of the first host.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx

from ai_assistant.daemon.fetch.source import check_url, is_loopback, origin
from ai_assistant.errors import AIAssistantError, DownloadFailed, InvalidArgument, NoSuchModel, NotAuthorized

MAX_REDIRECTS = 8
MAX_LISTING_BYTES = 16 << 20
CONNECT_TIMEOUT_S = 20.0
_REDIRECTS = (301, 302, 303, 307, 308)
_AGAIN = (408, 425, 429, 500, 502, 503, 504)


class TryAgain(Exception):
    """It may work later.

    Args:
        error: what to say when it does not.
        after_s: how long the server asks to wait, if it does.
    """

    def __init__(self, error: AIAssistantError, after_s: float | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.after_s = after_s


@dataclass(frozen=True, slots=True)
class Answer:
    """The last answer of a chain of redirects, its body still to be read.

    Attributes:
        linked_sha256: the SHA-256 that the first host promised for what it links to; empty if it did not.
    """

    response: httpx.Response
    linked_sha256: str = ""

    @property
    def host(self) -> str:
        return str(self.response.url.host)


class Web:
    """Requests on behalf of one source.

    Args:
        first: the URL whose origin alone gets the token.
        token: empty for none.
        allow_http: whether addresses without encryption may lead to other machines.
        silence_s: the longest time without a byte.
    """

    def __init__(self, first: str, *, token: str = "", allow_http: bool = False, silence_s: float = 60.0) -> None:
        self._origin = origin(first)
        self._token = token
        self._allow_http = allow_http
        self._client = httpx.Client(
            # The system's authorities, not a list of the library's own.
            verify=ssl.create_default_context(),
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(silence_s, connect=min(CONNECT_TIMEOUT_S, silence_s)),
            limits=httpx.Limits(max_connections=2, max_keepalive_connections=1),
            headers={"User-Agent": "ai-assistant", "Accept-Encoding": "identity"},
        )

    def close(self) -> None:
        self._client.close()

    @contextlib.contextmanager
    def open(self, url: str, headers: Mapping[str, str], *, method: str = "GET") -> Iterator[Answer]:
        """The answer to a request: 200, 206 or 416, and nothing else.

        Raises:
            TryAgain: a server or a line that may get better.
            NoSuchModel, NotAuthorized, DownloadFailed
        """
        trusted = self._token != ""
        linked = ""
        first_is_here = is_loopback(urlsplit(url).hostname or "")
        for _ in range(MAX_REDIRECTS + 1):
            # Once it has led elsewhere, no later hop gets the token back.
            trusted = trusted and origin(url) == self._origin
            more = {"Authorization": f"Bearer {self._token}"} if trusted else {}
            with _named(url), self._client.stream(method, url, headers={**headers, **more}) as response:
                # What one host sets must not be told to another.
                self._client.cookies.clear()
                if origin(url) == self._origin:
                    linked = linked or _sha256(response.headers.get("x-linked-etag", ""))
                if response.status_code not in _REDIRECTS:
                    _check_status(response, url, told=self._token != "")
                    encoding = response.headers.get("content-encoding", "identity").strip().lower()
                    if encoding not in ("", "identity"):
                        raise DownloadFailed(f"{_host(url)} sends it compressed ({encoding[:20]}), though asked not to")
                    yield Answer(response, linked)
                    return
                url = self._next(url, response.headers.get("location", ""), first_is_here)
        raise DownloadFailed(f"more than {MAX_REDIRECTS} redirects")

    def _next(self, url: str, location: str, first_is_here: bool) -> str:
        try:
            target = urljoin(url, location) if location else ""
            target = check_url(target.partition("#")[0], self._allow_http)
        except (InvalidArgument, ValueError) as error:
            raise DownloadFailed(f"{_host(url)} redirects to an unusable address: {error}") from None
        secure, now = urlsplit(url).scheme == "https", urlsplit(target)
        if secure and now.scheme != "https":
            raise DownloadFailed(f"{_host(url)} redirects to an address without encryption")
        if is_loopback(now.hostname or "") and not first_is_here:
            raise DownloadFailed(f"{_host(url)} redirects to this machine itself")
        return target

    def json(self, url: str) -> Any:
        """A JSON document of at most 16 MiB.

        Raises:
            TryAgain, NoSuchModel, NotAuthorized, DownloadFailed
        """
        body = bytearray()
        with self.open(url, {"Accept": "application/json"}) as answer:
            for piece in answer.response.iter_raw():
                body += piece
                if len(body) > MAX_LISTING_BYTES:
                    raise DownloadFailed(f"the answer of {answer.host} is absurdly long")
        try:
            return json.loads(bytes(body))
        except (ValueError, RecursionError):
            raise DownloadFailed(f"the answer of {_host(url)} is no JSON", hint="is it a model hub?") from None


def _check_status(response: httpx.Response, url: str, *, told: bool) -> None:
    status = response.status_code
    where = _host(url)
    if status in (200, 206, 416):
        return
    if status in (401, 403):
        hint = "is the token right, and was the model's licence accepted there?"
        if not told:
            hint = "if it exists, it needs permission: accept its licence there and give a token (--token-file)"
        raise NotAuthorized(f"{where} refuses it (status {status})", hint=hint)
    if status in (404, 410):
        raise NoSuchModel(f"{where} has no such repository, revision or file", hint="check its name", param="source")
    if status in _AGAIN:
        after = _after(response.headers.get("retry-after", ""))
        what = "has too many requests" if status == 429 else "cannot answer now"
        raise TryAgain(DownloadFailed(f"{where} {what} (status {status})", hint="try again later"), after)
    raise DownloadFailed(f"{where} answered with status {status}")


def _after(value: str) -> float | None:
    """Seconds of a Retry-After header, which may also be a date; None for nonsense."""
    if value.strip().isdecimal() and len(value) < 10:
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    """httpx's errors as ours; those of whoever reads the body pass through here as well."""
    where = _host(url)
    try:
        yield
    except httpx.TimeoutException as error:
        raise TryAgain(DownloadFailed(f"{where} does not answer", hint="try again later")) from error
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
        raise DownloadFailed(f"the address at {where} cannot be used: {error}") from error
    except httpx.HTTPError as error:
        cause = _cause(error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            hint = "is this machine's clock right? Authorities of your own belong in /etc/ssl/certs"
            raise DownloadFailed(f"{where} cannot prove who it is: {cause.verify_message}", hint=hint) from error
        if isinstance(cause, ssl.SSLError):
            raise TryAgain(DownloadFailed(f"no secure connection to {where}: {cause.reason}")) from error
        if isinstance(cause, socket.gaierror):
            hint = "is the network connected? See ai-assistant status"
            raise TryAgain(DownloadFailed(f"the name {where} cannot be resolved", hint=hint)) from error
        why = getattr(cause, "strerror", None) or str(error) or type(error).__name__
        hint = "is the network connected? See ai-assistant status"
        raise TryAgain(DownloadFailed(f"the connection to {where} failed: {why}"[:500], hint=hint)) from error


def _cause(error: BaseException) -> BaseException:
    """The innermost exception behind one of httpx's."""
    seen = error
    for _ in range(8):
        inner = seen.__cause__ or seen.__context__
        if inner is None:
            break
        seen = inner
        if isinstance(seen, ssl.SSLError | socket.gaierror):
            break
    return seen


def _host(url: str) -> str:
    parts = urlsplit(url)
    return parts.netloc[:200] or "the server"


def _sha256(etag: str) -> str:
    text = etag.strip().removeprefix("W/").strip('"').lower()
    return text if len(text) == 64 and all(each in "0123456789abcdef" for each in text) else ""
