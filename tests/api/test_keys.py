"""API keys: made, kept as hashes, limited, and gone when they should be; and what damaged files do."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.daemon.api.errors import HttpError
from ai_assistant.daemon.api.front import Failures
from ai_assistant.daemon.api.keys import MAX_KEYS, PREFIX, KeyStore
from ai_assistant.errors import AlreadyExists, InternalError, InvalidArgument


class Time:
    def __init__(self) -> None:
        self.now = 1_750_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "api-keys.json"


def test_a_key_logs_in_also_after_a_restart_and_only_its_hash_is_kept(path: Path) -> None:
    key, secret = KeyStore(path).add({"name": "laptop"})
    assert secret.startswith(PREFIX)
    assert len(secret) == len(PREFIX) + 43
    again = KeyStore(path)
    login = again.login(secret)
    assert login is not None
    assert login.key == key
    assert set(login.scopes) == {"infer", "read"}
    text = path.read_text()
    assert secret not in text
    assert secret.removeprefix(PREFIX) not in text
    assert hashlib.sha256(secret.encode()).hexdigest() in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key.digest not in json.dumps(key.public())
    assert secret not in repr(key)


def test_no_other_text_logs_in(path: Path) -> None:
    store = KeyStore(path)
    key, secret = store.add({"name": "laptop"})
    for wrong in ("", PREFIX, secret[:-1], secret + "x", secret.upper(), key.id, key.digest, "\ud800", "x" * 100_000):
        assert store.login(wrong) is None


def test_two_keys_are_never_the_same(path: Path) -> None:
    store = KeyStore(path)
    assert len({store.add({"name": f"n{k}"})[1] for k in range(50)}) == 50


def test_a_removed_key_is_gone_at_once(path: Path) -> None:
    store = KeyStore(path)
    key, secret = store.add({"name": "laptop"})
    assert store.remove("nobody") is None
    assert store.remove("laptop") == key
    assert store.login(secret) is None
    assert KeyStore(path).all() == []


def test_a_key_expires(path: Path) -> None:
    clock = Time()
    store = KeyStore(path, now=clock)
    _, secret = store.add({"name": "guest", "expires_s": 60})
    clock.now += 59
    assert store.login(secret) is not None
    clock.now += 1
    assert store.login(secret) is None


def test_requests_per_minute(path: Path) -> None:
    clock = Time()
    store = KeyStore(path, clock=clock)
    _, secret = store.add({"name": "slow", "requests_per_minute": 3})
    login = store.login(secret)
    assert login is not None
    for _ in range(3):
        login.admit()
    with pytest.raises(HttpError) as caught:
        login.admit()
    assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "20"})
    clock.now += 20
    login.admit()
    with pytest.raises(HttpError):
        login.admit()
    # An hour of silence is worth one minute, not sixty.
    clock.now += 3600
    for _ in range(3):
        login.admit()
    with pytest.raises(HttpError):
        login.admit()


def test_tokens_per_minute_are_paid_afterwards(path: Path) -> None:
    clock = Time()
    store = KeyStore(path, clock=clock)
    _, secret = store.add({"name": "slow", "tokens_per_minute": 600})
    login = store.login(secret)
    assert login is not None
    login.admit()
    login.spend(1200)
    with pytest.raises(HttpError) as caught:
        login.admit()
    assert caught.value.headers == {"retry-after": "61"}
    clock.now += 61
    login.admit()


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": " x"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "\x1b[31m"}, "name"),
        ({"name": 3}, "name"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": "x", "scopes": "infer"}, "scopes"),
        ({"name": "x", "scopes": ["infer", "remove"]}, "scopes"),
        ({"name": "x", "scopes": [["infer"]]}, "scopes"),
        ({"name": "x", "expires_s": -1}, "expires_s"),
        ({"name": "x", "expires_s": 1.5}, "expires_s"),
        ({"name": "x", "expires_s": 10**12}, "expires_s"),
        ({"name": "x", "requests_per_minute": True}, "requests_per_minute"),
        ({"name": "x", "tokens_per_minute": -5}, "tokens_per_minute"),
        ({"name": "x", "tokens_per_minute": float("nan")}, "tokens_per_minute"),
    ],
)
def test_a_wrong_value_is_named(path: Path, values: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        KeyStore(path).add(values)
    assert caught.value.param == param
    assert not path.exists()


def test_names_are_unique_and_keys_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ai_assistant.daemon.api.keys.MAX_KEYS", 3)
    assert MAX_KEYS >= 100
    store = KeyStore(path)
    for name in ("a", "b", "c"):
        store.add({"name": name})
    with pytest.raises(AlreadyExists, match="named a"):
        store.add({"name": "a"})
    with pytest.raises(AlreadyExists, match="3 keys"):
        store.add({"name": "d"})


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[1]", b'[{"id": "x"}]', b"\xff", b"[" * 100_000,
        b'[{"id":"a","name":"b","digest":"","scopes":["infer"],"created":1}]',
        b'[{"id":"a","name":"b","digest":"%s","scopes":["root"],"created":1}]' % (b"0" * 64),
        b'[{"id":"a","name":"b","digest":"%s","scopes":["infer"],"created":"1"}]' % (b"0" * 64),
    ],
)  # fmt: skip
def test_a_damaged_file_lets_nobody_in_and_is_replaced(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    store = KeyStore(path)
    assert store.all() == []
    assert store.login("") is None
    _, secret = store.add({"name": "new"})
    assert KeyStore(path).login(secret) is not None


def test_a_key_that_cannot_be_written_is_not_good(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = KeyStore(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ai_assistant.daemon.api.keys.os.fsync", full)
    with pytest.raises(InternalError, match="No space left"):
        store.add({"name": "x"})
    assert store.all() == []
    assert list(path.parent.iterdir()) == []


def test_failures_of_one_source_get_slower_and_are_forgotten() -> None:
    clock = Time()
    failures = Failures(clock)
    delays = [failures.delay_s("a") for _ in range(12)]
    assert delays == sorted(delays)
    assert delays[0] < 0.2
    assert delays[-1] == 5.0
    assert failures.delay_s("b") == delays[0]
    failures.forget("a")
    assert failures.delay_s("a") == delays[0]
    failures.delay_s("a")
    clock.now += 901
    assert failures.delay_s("a") == delays[0]
    for k in range(5000):
        failures.delay_s(str(k))
    assert len(failures._seen) == 1024
