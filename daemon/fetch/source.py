"""Where a model comes from: ``hf:owner/name[:file or quantisation][@revision]`` on a hub, or a URL.

Pure parsing, for the daemon, which has no network, and the fetching process alike.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from ai_assistant.errors import InvalidArgument

HUB_PREFIX = "hf:"
MAX_SOURCE = 2048
MAX_FILE_NAME = 1024
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_FORMS = "hf:owner/name, hf:owner/name:Q4_K_M, hf:owner/name:file.gguf@revision, or https://host/file.gguf"


@dataclass(frozen=True, slots=True)
class HubSource:
    """Files of a repository on a hub."""

    endpoint: str
    """Beginning of all its URLs, without a slash at the end."""
    owner: str
    repository: str
    selector: str = ""
    """A file's path, a quantisation, or empty."""
    revision: str = "main"

    @property
    def shown(self) -> str:
        """For messages and logs."""
        selector = f":{self.selector}" if self.selector else ""
        revision = f"@{self.revision}" if self.revision != "main" else ""
        return f"{HUB_PREFIX}{self.owner}/{self.repository}{selector}{revision}"

    @property
    def origin(self) -> str:
        """The URL whose host a token is meant for."""
        return self.endpoint

    @property
    def listing_url(self) -> str:
        return f"{self.endpoint}/api/models/{self.owner}/{self.repository}/revision/{quote(self.revision, safe='')}"

    def file_url(self, path: str, revision: str) -> str:
        """Where a file is, at a revision."""
        return f"{self.endpoint}/{self.owner}/{self.repository}/resolve/{quote(revision, safe='')}/{quote(path)}"


@dataclass(frozen=True, slots=True)
class UrlSource:
    """One file by its address."""

    url: str

    @property
    def shown(self) -> str:
        """Without the query, which may hold a signature that nobody else should have."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}{parts.path}"

    @property
    def origin(self) -> str:
        return self.url


Source = HubSource | UrlSource


def parse(text: str, *, endpoint: str, allow_http: bool = False) -> Source:
    """Read what somebody typed.

    Args:
        endpoint: the hub's URL.
        allow_http: whether addresses without encryption may lead to other machines.

    Raises:
        InvalidArgument
    """
    if len(text) > MAX_SOURCE:
        raise InvalidArgument(f"a source of {len(text)} characters", param="source")
    if text.startswith(HUB_PREFIX):
        return _hub(text, check_url(endpoint.rstrip("/"), allow_http, "endpoint"))
    if text.startswith(("https://", "http://")):
        return UrlSource(check_url(text.partition("#")[0], allow_http, "source"))
    raise InvalidArgument(f"{text[:100]!r} is no source of models", hint=_FORMS, param="source")


def _hub(text: str, endpoint: str) -> HubSource:
    body, at, revision = text.removeprefix(HUB_PREFIX).rpartition("@")
    if not at:
        body, revision = revision, "main"
    path, colon, selector = body.partition(":")
    owner, slash, repository = path.partition("/")
    if not slash or not _PART.fullmatch(owner) or not _PART.fullmatch(repository):
        raise InvalidArgument(f"{text[:100]!r} names no repository", hint=_FORMS, param="source")
    if colon and not usable_path(selector):
        raise InvalidArgument(f"{selector[:100]!r} names no file and no quantisation", hint=_FORMS, param="source")
    if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision:
        raise InvalidArgument(f"{revision[:100]!r} is no revision", hint=_FORMS, param="source")
    return HubSource(endpoint, owner, repository, selector, revision)


def usable_path(path: str) -> bool:
    """Whether a file's name in a repository is one that may be asked for: relative, without tricks."""
    return (
        0 < len(path) <= MAX_FILE_NAME
        and path.isprintable()
        and "\\" not in path
        and all(part not in ("", ".", "..") for part in path.split("/"))
    )


def check_url(url: str, allow_http: bool, param: str | None = None) -> str:
    """The URL, if it may be asked for.

    Raises:
        InvalidArgument: no https, a password in it, or no URL at all.
    """
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidArgument(f"an unusable address: {error}", param=param) from None
    if not host or not url.isascii() or not url.isprintable() or " " in url or len(url) > 4 * MAX_SOURCE:
        raise InvalidArgument("an unusable address: no host, or characters that no URL has", param=param)
    if parts.username is not None or parts.password is not None:
        raise InvalidArgument("the address has a password in it", hint="give a token instead", param=param)
    if parts.scheme == "http" and (allow_http or is_loopback(host)):
        return url
    if parts.scheme != "https":
        hint = "use https://, or allow http:// with pull.allow_http = true in the configuration"
        raise InvalidArgument(f"{parts.scheme or 'no scheme'}: what it sends could be changed on the way",
                              hint=hint, param=param)  # fmt: skip
    return url


def is_loopback(host: str) -> bool:
    """Whether a host's name in a URL is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def origin(url: str) -> tuple[str, str, int]:
    """(scheme, host, port): what a token was given for."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or (80 if parts.scheme == "http" else 443)


def key(source: Source) -> str:
    """The same for two wishes for the same thing; names a folder."""
    return hashlib.sha256(json.dumps(to_dict(source), sort_keys=True).encode()).hexdigest()[:32]


def to_dict(source: Source) -> dict[str, str]:
    return {"kind": "hub" if isinstance(source, HubSource) else "url", **asdict(source)}


def from_dict(values: Any, *, allow_http: bool) -> Source:
    """The inverse of `to_dict`.

    Raises:
        InvalidArgument
    """
    if not isinstance(values, Mapping) or not all(isinstance(each, str) for each in values.values()):
        raise InvalidArgument("a source that is none")
    fields = {key: value for key, value in values.items() if key != "kind"}
    try:
        if values.get("kind") == "url":
            return UrlSource(check_url(fields["url"], allow_http))
        made = HubSource(**fields)
    except (KeyError, TypeError) as error:
        raise InvalidArgument("a source that is none") from error
    check_url(made.endpoint, allow_http)
    return made
