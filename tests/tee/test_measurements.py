"""measurements.json: signed, of format 1, whole, and at one with itself."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from ai_assistant.tee.errors import BadSignature, InvalidMeasurements
from ai_assistant.tee.measurements import check_signature, load, parse
from tests.tee import boots
from tests.tee.boots import PHASES

REAL = Path(__file__).parent / "data" / "measurements-secure.json"


def test_what_image_sign_writes_is_read() -> None:
    found = parse(REAL.read_bytes())
    assert (found.profile, found.version, found.architecture) == ("test", "0.1.0", "x86-64")
    assert [section.name for section in found.sections][:3] == [".linux", ".osrel", ".cmdline"]
    assert {program.what: program.secure_boot for program in found.programs} == {
        "boot loader": None,
        "unified kernel image": None,
        "kernel inside it": False,
    }
    assert found.pcr11_at(PHASES) == found.pcr11[":".join(PHASES)]
    assert f"roothash={found.root_hash}" in found.command_line


def test_signed_and_read() -> None:
    raw = boots.published()
    assert load(raw, boots.sign(raw), boots.public("release")).version == "0.1.0"


def test_base64_may_be_in_lines() -> None:
    raw = boots.published()
    text = boots.sign(raw).decode().strip()
    check_signature(raw, f"{text[:40]}\r\n{text[40:]}\n\n".encode(), boots.public("release"))


def other_keys() -> list[bytes]:
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return [
        ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(*form),
        rsa.generate_private_key(65537, 2048).public_key().public_bytes(*form),
    ]


def test_what_the_release_key_did_not_sign_is_refused() -> None:
    raw = boots.published()
    good, key = boots.sign(raw), boots.public("release")
    cases = [
        (raw + b" ", good, key, "not signed by the release key"),
        (raw, boots.sign(raw, "Someone else"), key, "not signed by the release key"),
        (raw, good, boots.public("Someone else"), "not signed by the release key"),
        (raw, base64.b64encode(b"\x30\x06\x02\x01\x00\x02\x01\x00"), key, "not signed by the release key"),
        (raw, base64.b64encode(b"nonsense"), key, "not signed by the release key"),
        (raw, b"", key, "not signed by the release key"),
        (raw, b"!" + good, key, "not base64"),
        (raw, b"\xff\0", key, "not base64"),
        (raw, good * 1000, key, "too long"),
        (raw, good, b"", "no public key"),
        (raw, good, b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "no public key"),
        *((raw, good, each, "no elliptic-curve key") for each in other_keys()),
    ]
    for content, signature, public, words in cases:
        with pytest.raises(BadSignature, match=words) as caught:
            load(content, signature, public)
        assert caught.value.hint


def test_a_bad_signature_is_found_before_anything_is_read() -> None:
    with pytest.raises(BadSignature):
        load(b"no JSON", b"", boots.public("release"))


def test_unknown_keys_are_left_alone() -> None:
    document = boots.measurements() | {"later": {"more": [1]}}
    document["pcr11"]["later"] = 1
    document["pcr4"][0]["later"] = 1
    assert parse(json.dumps(document).encode()).version == "0.1.0"


def path(document: dict[str, Any], where: str, value: Any) -> bytes:
    """The document with one value replaced, or taken away (Ellipsis)."""
    *parents, last = where.split("/")
    place: Any = document
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    last_key: Any = int(last) if isinstance(place, list) else last
    if value is ...:
        del place[last_key]
    else:
        place[last_key] = value
    return json.dumps(document).encode()


REQUIRED = (
    "name", "profile", "version", "architecture", "uki", "root_hash", "command_line", "pcr4", "pcr4/0/what",
    "pcr4/0/sha256", "pcr7", "pcr7/secure_boot", "pcr7/variables", "pcr7/variables/0", "pcr7/variables/0/name",
    "pcr7/variables/0/guid", "pcr7/variables/0/sha256", "pcr7/authority", "pcr7/authority/0/sha256", "pcr11",
    "pcr11/sha256", "pcr11/sections", "pcr11/sections/0/name", "pcr11/sections/0/sha256", "pcr12", "pcr12/sha256",
)  # fmt: skip


@pytest.mark.parametrize("where", REQUIRED)
@pytest.mark.parametrize("value", [..., None, 7, [], {}, [[]], "\ud800", "\n", "x" * 20_000], ids=lambda v: repr(v)[:9])
def test_what_is_missing_or_of_the_wrong_kind_is_named(where: str, value: Any) -> None:
    with pytest.raises(InvalidMeasurements) as caught:
        parse(path(boots.measurements(), where, value))
    assert "measurements.json" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("format", 2, "format 2"),
        ("format", "1", "format 1, and"),
        ("format", True, "format True"),
        ("format", ..., "format None"),
        ("root_hash", "ab" * 31, "64 hex digits"),
        ("pcr12/sha256", "zz" * 32, "64 hex digits"),
        ("pcr11/sha256", {"enter-initrd": "00" * 32}, "contradicts itself"),
        ("pcr11/sections/0/name", ".evil", "contradicts itself"),
        ("pcr7/variables/0/guid", "no", "guid"),
        ("pcr4/2/secure_boot", "no", "neither true nor false"),
        ("pcr4", [{}] * 300, "list of 1 to 256"),
    ],
)
def test_what_contradicts_format_1_is_named(where: str, value: Any, words: str) -> None:
    with pytest.raises(InvalidMeasurements, match=words):
        parse(path(boots.measurements(), where, value))


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[]", b"7", b"[" * 100_000, b"{" * 100, b" " * 1024**2 + b"{}"])
def test_what_is_no_json_object_is_named(raw: bytes) -> None:
    with pytest.raises(InvalidMeasurements):
        parse(raw)


def test_a_changed_file_reads_or_is_refused_by_name() -> None:
    rng = random.Random(1)
    raw = REAL.read_bytes()
    refused = 0
    for _ in range(500):
        changed = bytearray(raw)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(changed))
            changed[at : at + rng.randrange(3)] = rng.choice((b"", b'"', b"{", b"9" * 5000, rng.randbytes(3)))
        try:
            parse(bytes(changed))
        except InvalidMeasurements:
            refused += 1
    assert refused > 300
