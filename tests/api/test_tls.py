"""The certificate: made once, kept, for the right names; the owner's goes first; a damaged one is made again."""

from __future__ import annotations

import datetime
import shutil
import ssl
import stat
from pathlib import Path

import pytest

from ai_assistant.daemon.api.tls import OWN_CERTIFICATE, OWN_KEY, certificate, context
from ai_assistant.errors import InvalidConfig

NAMES = ("box.example.org", ["192.0.2.7", "2001:db8::5%eth0", "not an address"])


def test_it_is_made_once_and_kept(tmp_path: Path) -> None:
    first = certificate(tmp_path / "tls", *NAMES)
    assert first.made_here
    assert set(first.names) == {
        "box.example.org", "box", "box.local", "localhost", "192.0.2.7", "2001:db8::5", "127.0.0.1", "::1",
    }  # fmt: skip
    assert len(first.fingerprint) == 95
    assert stat.S_IMODE(first.key.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "tls").stat().st_mode) == 0o700
    # Another address later is no reason for another fingerprint.
    assert certificate(tmp_path / "tls", "other", ["192.0.2.8"]) == first


def test_only_current_tls_is_spoken(tmp_path: Path) -> None:
    made = context(certificate(tmp_path, *NAMES))
    assert made.minimum_version == ssl.TLSVersion.TLSv1_2
    names = {each["name"] for each in made.get_ciphers()}
    assert all(each.startswith(("TLS_", "ECDHE-")) and ("GCM" in each or "CHACHA20" in each) for each in names)


@pytest.mark.parametrize("damage", ["cert.pem", "key.pem"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "other"])
def test_a_damaged_one_is_made_again(tmp_path: Path, damage: str, how: str) -> None:
    first = certificate(tmp_path, *NAMES)
    path = tmp_path / damage
    if how == "missing":
        path.unlink()
    elif how == "other":
        certificate(tmp_path / "two", *NAMES)
        shutil.copy(tmp_path / "two" / damage, path)
    else:
        path.write_bytes(b"" if how == "empty" else path.read_bytes()[:100])
    again = certificate(tmp_path, *NAMES)
    assert again.fingerprint != first.fingerprint
    context(again)


def test_one_that_ends_soon_is_made_again(tmp_path: Path) -> None:
    first = certificate(tmp_path, *NAMES)
    later = datetime.datetime.fromtimestamp(first.expires, datetime.UTC) - datetime.timedelta(days=5)
    again = certificate(tmp_path, *NAMES, now=later)
    assert again.expires > first.expires


def test_the_owners_goes_first(tmp_path: Path) -> None:
    mine = certificate(tmp_path / "mine", "mine.example.org", [])
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    shutil.copy(mine.path, credentials / OWN_CERTIFICATE)
    shutil.copy(mine.key, credentials / OWN_KEY)
    found = certificate(tmp_path / "tls", *NAMES, credentials=credentials)
    assert (found.fingerprint, found.made_here) == (mine.fingerprint, False)
    assert not (tmp_path / "tls").exists()
    context(found)
    with pytest.raises(InvalidConfig, match="expired"):
        certificate(tmp_path, *NAMES, credentials=credentials, now=datetime.datetime(2090, 1, 1, tzinfo=datetime.UTC))
    other = certificate(tmp_path / "other", *NAMES)
    shutil.copy(other.key, credentials / OWN_KEY)
    with pytest.raises(InvalidConfig, match="cannot be used"):
        context(certificate(tmp_path / "tls", *NAMES, credentials=credentials))
    (credentials / OWN_CERTIFICATE).write_text("nonsense")
    with pytest.raises(InvalidConfig, match="credstore"):
        certificate(tmp_path / "tls", *NAMES, credentials=credentials)
