"""`ai-assistant api …`: the unit is turned on by root's systemctl, keys are the daemon's."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ai_assistant.daemon.api.keys import KeyStore
from ai_assistant.daemon.api.network import Network
from ai_assistant.daemon.api.tls import certificate
from ai_assistant.daemon.contract import Scope
from tests.cli.conftest import Cli
from tests.sdk.served import Served, served


@pytest.fixture
def network(tmp_path: Path) -> Network:
    return Network(keys=KeyStore(tmp_path / "keys.json"))


@pytest.fixture
def daemon(tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("AI_ASSISTANT_SOCKET", str(tmp_path / "api.sock"))
    with served(tmp_path / "api.sock", network) as running:
        yield running


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A systemctl that writes down what it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "asked"
    script = folder / "systemctl"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    return log


def test_off_by_default(cli: Cli, daemon: Served) -> None:
    result = cli("api", "status")
    assert (result.status, result.out.split()) == (0, ["network", "API", "off", "keys", "0"])
    assert json.loads(cli("api", "status", "--json").out)["enabled"] is False


def test_a_key_is_shown_once(cli: Cli, daemon: Served, network: Network) -> None:
    made = cli("api", "key", "add", "laptop", "--scope", "infer", "--expires", "7d", "--requests", "60")
    assert made.status == 0
    secret = made.out.strip()
    login = network.keys.login(secret)
    assert login is not None
    assert (login.key.name, login.key.scopes, login.key.requests_per_minute) == ("laptop", ("infer",), 60)
    assert login.key.expires == login.key.created + 7 * 86400
    listed = cli("api", "key", "list")
    assert "laptop" in listed.out
    assert secret not in listed.out + cli("api", "key", "list", "--json").out
    assert cli("api", "key", "remove", "laptop").status == 2  # nobody to ask
    assert cli("api", "key", "remove", "laptop", "--yes").out == "removed laptop\n"
    assert network.keys.login(secret) is None
    gone = cli("api", "key", "remove", "laptop", "--yes")
    assert gone.status == 1
    assert "no such key" in gone.err


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (("add", "x", "--expires", "soon"), 2),
        (("add", "x", "--expires", "0d"), 2),
        (("add", "x", "--requests", "-1"), 2),
        (("add", "x", "--scope", "remove"), 1),
        (("add", ""), 1),
        (("add", "a\nb"), 1),
        (("remove", "../../health", "--yes"), 1),
    ],
)
def test_wrong_keys(cli: Cli, daemon: Served, network: Network, args: tuple[str, ...], status: int) -> None:
    assert cli("api", "key", *args).status == status
    assert network.keys.all() == []


def test_keys_are_for_administrators(cli: Cli, daemon: Served) -> None:
    daemon.allowed.discard(Scope.NETWORK_API)
    for args in (("add", "x"), ("list",), ("remove", "x", "--yes")):
        result = cli("api", "key", *args)
        assert result.status == 3
        assert "ai-assistant-admin" in result.err
    assert cli("api", "status").status == 0


def test_enable(cli: Cli, daemon: Served, network: Network, systemctl: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    network.problem = ""
    network.certificate = certificate(tmp_path / "tls", "box", [])
    network.sockets = [None]  # type: ignore[list-item]
    result = cli("api", "enable", "--address", "::1", "--port", "9443", "--root", str(root), "--yes")
    assert result.status == 0
    assert network.certificate.fingerprint in result.out
    unit = "ai-assistant-api-tcp.socket"
    assert systemctl.read_text().splitlines() == [
        "daemon-reload", f"enable {unit}", "restart ai-assistantd.service",
    ]  # fmt: skip
    written = (root / f"etc/systemd/system/{unit}.d/10-listen.conf").read_text()
    assert written == "[Socket]\nListenStream=\nListenStream=[::1]:9443\n"


def test_disable(cli: Cli, daemon: Served, systemctl: Path) -> None:
    assert cli("api", "disable", "--yes").status == 0
    unit = "ai-assistant-api-tcp.socket"
    assert systemctl.read_text().splitlines() == [f"disable {unit}", f"stop {unit}", "restart ai-assistantd.service"]


def test_ones_own_certificate(cli: Cli, daemon: Served, network: Network, systemctl: Path, tmp_path: Path) -> None:
    mine, other = certificate(tmp_path / "mine", "box", []), certificate(tmp_path / "other", "box", [])
    root = tmp_path / "root"
    enable = ("api", "enable", "--root", str(root), "--yes")
    wrong = cli(*enable, "--certificate", str(mine.path), "--private-key", str(other.key))
    assert wrong.status == 1
    assert "belong together" in wrong.err
    assert not root.exists()
    assert cli(*enable, "--certificate", str(mine.path)).status == 2
    network.sockets = [None]  # type: ignore[list-item]
    assert cli(*enable, "--certificate", str(mine.path), "--private-key", str(mine.key)).status == 0
    kept = root / "etc/credstore/ai-assistant.tls.key"
    assert kept.read_bytes() == mine.key.read_bytes()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_what_stops_enable(cli: Cli, daemon: Served, systemctl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("api", "enable").status == 2  # nobody to ask
    assert cli("api", "enable", "--yes", "--address", "box").status == 2
    assert cli("api", "enable", "--yes", "--port", "0").status == 2
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert cli("api", "enable", "--yes").status == 3
    assert cli("api", "disable", "--yes").status == 3
    assert not systemctl.exists()


def test_a_problem_is_told(cli: Cli, daemon: Served, network: Network) -> None:
    network.problem = "the certificate in /etc/credstore has expired"
    result = cli("api", "status")
    assert result.status == 1
    assert "has expired" in result.err
