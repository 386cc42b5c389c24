"""The record of how the storage is protected: one sentence of it for everybody, and no record that breaks anything."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.tee import storage
from ai_assistant.tee.storage import Encryption, SecureBoot
from tests.support.recovery import ENCRYPTED, PLAIN, describe, flag, key_waits


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "encrypted, opened by the TPM"),
        ({"opened_by": ""}, "encrypted, bound to the TPM"),
        ({"secure_boot": "off"}, "encrypted, opened by the TPM; weak, since Secure Boot is not on"),
        ({"secure_boot": "setup"}, "encrypted, opened by the TPM; weak, since Secure Boot is not on"),
        ({"opened_by": "recovery-key"}, "encrypted, opened by the recovery key because the TPM did not"),
        (PLAIN, "not encrypted: this machine has no TPM"),
        ({**PLAIN, "reason": ""}, "not encrypted"),
        (
            {**PLAIN, "encryption": "volatile", "reason": "started from a stick"},
            "in memory only, and lost at power-off: started from a stick",
        ),
    ],
)
def test_the_protection_is_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    describe(tmp_path, ENCRYPTED | changes)
    assert storage.read(tmp_path).sentence() == sentence


def test_what_a_record_says(tmp_path: Path) -> None:
    describe(tmp_path, ENCRYPTED | {"from_a_later_version": [1]})
    found = storage.read(tmp_path)
    assert (found.encryption, found.opened_by, found.device) == (Encryption.TPM2, "tpm2", "/dev/vda6")
    assert (found.secure_boot, found.tpm) == (SecureBoot.ON, True)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no JSON"),
        (json.dumps(ENCRYPTED).encode()[:-9], "no JSON"),
        (b"\xff\xfe\x00binary", "no JSON"),
        (b"[" * 60_000, "no JSON"),
        (b"1" * 60_000, "no JSON"),
        (b"[]", "no JSON object"),
        (b"null", "no JSON object"),
        (b" " * (storage.MAX_BYTES + 1), f"larger than {storage.MAX_BYTES} bytes"),
        (b"{}", "unknown encryption ''"),
        (json.dumps(ENCRYPTED | {"encryption": "rot13"}).encode(), "unknown encryption 'rot13'"),
        (json.dumps(ENCRYPTED | {"encryption": "unknown"}).encode(), "unknown encryption 'unknown'"),
        (json.dumps(ENCRYPTED | {"encryption": 7}).encode(), "encryption is no text"),
        (json.dumps(ENCRYPTED | {"reason": ["x"]}).encode(), "reason is no text"),
        (json.dumps(ENCRYPTED | {"opened_by": None}).encode(), "opened_by is no text"),
        (json.dumps(ENCRYPTED | {"tpm": "yes"}).encode(), "tpm is neither true nor false"),
    ],
)
def test_a_broken_record_is_unknown_and_says_why(tmp_path: Path, content: bytes, why: str) -> None:
    describe(tmp_path, content)
    found = storage.read(tmp_path)
    assert found.encryption is Encryption.UNKNOWN
    assert found.reason == f"/run/ai-assistant-storage/state.json: {why}"
    assert not found.tpm
    assert found.sentence() == f"unknown: {found.reason}"


def test_a_machine_without_a_record(tmp_path: Path) -> None:
    assert storage.read(tmp_path).sentence() == "unknown: nothing here looks after the storage, as in a container"
    assert not storage.pending(tmp_path)


def test_a_link_is_not_followed_and_nothing_is_waited_for(tmp_path: Path) -> None:
    path = describe(tmp_path, ENCRYPTED)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert storage.read(tmp_path).reason.endswith("a symbolic link")
    path.unlink()
    os.mkfifo(path)
    assert storage.read(tmp_path).reason.endswith("no regular file")
    path.unlink()
    path.mkdir()
    assert storage.read(tmp_path).encryption is Encryption.UNKNOWN


def test_a_reason_cannot_steer_a_console(tmp_path: Path) -> None:
    describe(tmp_path, PLAIN | {"reason": "no\x1b[2J TPM\n\nroot's\tpassword: " + "x" * 1000})
    reason = storage.read(tmp_path).reason
    assert reason.startswith("no\ufffd[2J TPM root's password: xxx")
    assert len(reason) == 300


def test_a_secure_boot_state_of_later_versions_is_unknown(tmp_path: Path) -> None:
    describe(tmp_path, ENCRYPTED | {"secure_boot": "audit"})
    assert storage.read(tmp_path).secure_boot is SecureBoot.UNKNOWN


def test_everybody_sees_that_a_key_waits(tmp_path: Path) -> None:
    key_waits(tmp_path)
    assert storage.pending(tmp_path)
    flag(tmp_path).unlink()
    assert not storage.pending(tmp_path)
