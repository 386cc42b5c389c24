"""API keys: what logs in over the network. Only their hashes are kept.

A key is 256 random bits, so SHA-256 is the right hash: there is no dictionary to try, and a slow hash such as
scrypt would only give strangers a way to keep the processor busy.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ai_assistant.daemon.api.errors import HttpError, retry_after
from ai_assistant.errors import AlreadyExists, Busy, InternalError, InvalidArgument

log = logging.getLogger(__name__)

PREFIX = "aia_"
SCOPES = ("infer", "read")
"""What a key may be good for; what needs an administrator goes over the unix socket and the bus only."""
MAX_KEYS = 256
MAX_PER_MINUTE = 10**9
MAX_EXPIRY_S = 100 * 366 * 86400
_NAME = re.compile(r"[\w .@-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key without its secret. Times in Unix seconds; limits per minute, 0: none."""

    id: str
    name: str
    digest: str
    """SHA-256 of the whole key, in hexadecimal."""
    scopes: tuple[str, ...]
    created: int
    expires: int = 0
    """0: never."""
    requests_per_minute: int = 0
    tokens_per_minute: int = 0

    def public(self) -> dict[str, Any]:
        """What may be shown: not even the hash."""
        found = asdict(self)
        del found["digest"]
        return found | {"scopes": list(self.scopes), "expires": self.expires or None}


class Bucket:
    """An allowance that refills evenly, and holds at most a minute's worth. It may go below zero."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._rate = per_minute / 60
        self._most = float(per_minute)
        self._clock = clock
        self._level = self._most
        self._at = clock()

    def wait_s(self, wanted: float = 1.0) -> float:
        """Seconds until `wanted` is there; 0 when it is."""
        if not self._rate:
            return 0.0
        now = self._clock()
        self._level = min(self._most, self._level + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, (wanted - self._level) / self._rate)

    def take(self, count: float) -> None:
        if self._rate:
            self._level -= count


class Login:
    """A key in use: its scopes, and what is left of its allowances."""

    def __init__(self, key: ApiKey, clock: Callable[[], float]) -> None:
        self.key = key
        self.scopes = frozenset(key.scopes)
        self._requests = Bucket(key.requests_per_minute, clock)
        self._tokens = Bucket(key.tokens_per_minute, clock)

    def admit(self) -> None:
        """Count a request.

        Raises:
            HttpError: 429, the key has used up what it may; with the time after which it may again.
        """
        for bucket, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            wait = bucket.wait_s()
            if wait > 0:
                seconds = max(1, math.ceil(wait))
                error = Busy(f"this key has used up its {what} per minute", hint=f"try again in {seconds} s")
                raise HttpError(429, error, headers=retry_after(seconds))
        self._requests.take(1)

    def spend(self, tokens: int) -> None:
        """Count tokens once they are known; a long answer is paid for by the wait before the next."""
        self._tokens.take(tokens)


class KeyStore:
    """All keys, in one file that only the daemon may read. Changed keys count at once.

    A file that cannot be read lets nobody in, and is replaced by the next change.
    """

    def __init__(
        self,
        path: Path,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._now = now
        self._clock = clock
        self._logins = {each.id: Login(each, clock) for each in _read(path)}

    def all(self) -> list[ApiKey]:
        """Oldest first."""
        return sorted((each.key for each in self._logins.values()), key=lambda key: (key.created, key.id))

    def add(self, values: Mapping[str, Any]) -> tuple[ApiKey, str]:
        """Make a key from `name`, `scopes`, `expires_s`, `requests_per_minute` and `tokens_per_minute`.

        Returns:
            The key and its secret, which is nowhere else from now on.

        Raises:
            InvalidArgument: with the parameter's name.
            AlreadyExists: the name is taken, or there are too many.
            InternalError: it cannot be written.
        """
        name = values.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name != name.strip():
            raise InvalidArgument("name must be 1 to 64 letters, digits, spaces or . _ @ -", param="name")
        if any(each.name == name for each in self.all()):
            raise AlreadyExists(f"there is already a key named {name}", param="name")
        if len(self._logins) >= MAX_KEYS:
            raise AlreadyExists(f"there are {MAX_KEYS} keys", hint="remove one of them")
        expires_s = _whole(values, "expires_s", MAX_EXPIRY_S)
        secret = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
        now = int(self._now())
        key = ApiKey(
            id=secrets.token_hex(4),
            name=name,
            digest=_digest(secret),
            scopes=_scopes(values.get("scopes")),
            created=now,
            expires=now + expires_s if expires_s else 0,
            requests_per_minute=_whole(values, "requests_per_minute", MAX_PER_MINUTE),
            tokens_per_minute=_whole(values, "tokens_per_minute", MAX_PER_MINUTE),
        )
        self._save([*self.all(), key])
        self._logins[key.id] = Login(key, self._clock)
        log.info("added the API key %s", key.id)
        return key, secret

    def remove(self, which: str) -> ApiKey | None:
        """Forget a key by its id or name; None when there is none.

        Raises:
            InternalError: it cannot be written, and is still good.
        """
        found = next((each for each in self.all() if which in (each.id, each.name)), None)
        if found is not None:
            self._save([each for each in self.all() if each.id != found.id])
            del self._logins[found.id]
            log.info("removed the API key %s", found.id)
        return found

    def login(self, secret: str) -> Login | None:
        """The key with that secret, unless it has expired or never was."""
        digest = _digest(secret)
        found: Login | None = None
        # Every one is looked at, and each in constant time: how long it takes says nothing.
        for each in self._logins.values():
            if hmac.compare_digest(each.key.digest, digest):
                found = each
        if found is not None and found.key.expires and self._now() >= found.key.expires:
            return None
        return found

    def _save(self, keys: Sequence[ApiKey]) -> None:
        try:
            _write(self._path, keys)
        except OSError as error:
            raise InternalError(
                f"the keys cannot be written: {error.strerror}",
                hint="ai-assistant doctor says whether the disk is full",
            ) from error


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def _scopes(value: object) -> tuple[str, ...]:
    if value is None:
        return SCOPES
    if not isinstance(value, list) or not value or any(each not in SCOPES for each in value):
        raise InvalidArgument(f"scopes must be a list of {' and '.join(SCOPES)}", param="scopes")
    return tuple(sorted(set(value)))


def _whole(values: Mapping[str, Any], name: str, most: int) -> int:
    value = values.get(name)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise InvalidArgument(f"{name} must be a whole number from 0 to {most}", param=name)
    return value


def _read(path: Path) -> list[ApiKey]:
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_MAX_FILE_BYTES))
        return [_parsed(each) for each in values]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, RecursionError, InvalidArgument) as error:
        log.error("cannot read the API keys, so none is good: %s: %s", path, type(error).__name__)
        return []


def _parsed(values: dict[str, Any]) -> ApiKey:
    key = ApiKey(**{**values, "scopes": _scopes(values["scopes"])})
    numbers = (key.created, key.expires, key.requests_per_minute, key.tokens_per_minute)
    texts = (key.id, key.name, key.digest)
    if not all(type(each) is int and each >= 0 for each in numbers) or not all(type(each) is str for each in texts):
        raise ValueError("not a key")
    if not _DIGEST.fullmatch(key.digest):
        raise ValueError("not a hash")
    return key


def _write(path: Path, keys: Sequence[ApiKey]) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(json.dumps([asdict(each) for each in keys]).encode())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
