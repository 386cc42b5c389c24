"""The report of a certification: canonical JSON, signed with Ed25519, and read again with suspicion."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ai_assistant.errors import AlreadyExists, InvalidArgument, NotAuthorized
from ai_assistant.hal.conformance import VERSION
from ai_assistant.hal.conformance.case import Outcome, Result
from ai_assistant.hal.conformance.levels import Level, reached

FORMAT = 1
MAX_BYTES = 8 << 20
MAX_RESULTS = 5000
_CASE = re.compile(r"L[1-4](\.[A-Za-z0-9_]{1,64}){1,4}")
_HEX = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}")
_WHO = {"name", "version", "file", "sha256"}


@dataclass(frozen=True, slots=True)
class Report:
    """What a certification found.

    Args:
        backend: name, version, and for a file its name and SHA-256.
        device: id, name, kind; hal_id of the detected device where that is known.
        host: machine, system, Python.
        suite: version and SHA-256 of the suite's files.
        reproduced: run twice, with the same outcomes.
        expected: case → why its failure was expected.
        made: when, as in 2026-11-23T05:00:00Z.
    """

    backend: Mapping[str, str]
    device: Mapping[str, str]
    host: Mapping[str, str]
    suite: Mapping[str, str]
    seed: int
    examples: int
    reproduced: bool
    made: str
    results: tuple[Result, ...]
    expected: Mapping[str, str]

    @property
    def judged(self) -> tuple[Level, str]:
        """The level that the results earn, and what keeps them from the next."""
        library = self.backend.get("file", "").endswith(".so")
        return reached(self.results, reproduced=self.reproduced, library=library, suite=self.suite["version"])

    def to_dict(self) -> dict[str, Any]:
        level, next_needs = self.judged
        return {
            "format": FORMAT,
            "level": str(level),
            "next": next_needs,
            **{name: dict(getattr(self, name)) for name in ("backend", "device", "host", "suite", "expected")},
            **{name: getattr(self, name) for name in ("seed", "examples", "reproduced", "made")},
            "results": [asdict(result) for result in self.results],
        }


def canonical(document: Mapping[str, Any]) -> bytes:
    """The one way to write a document: sorted keys, no spaces, ASCII. It has no fractions: numbers are unambiguous."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def signed(report: Report, key: Ed25519PrivateKey | None) -> bytes:
    """The report's file. Without a key it says that nobody answers for it."""
    document = report.to_dict()
    if key is None:
        signature: Any = {"algorithm": "unsigned"}
    else:
        public = key.public_key().public_bytes_raw()
        signature = {
            "algorithm": "ed25519",
            "public_key": base64.b64encode(public).decode(),
            "value": base64.b64encode(key.sign(canonical(document))).decode(),
        }
    return (
        json.dumps({**document, "signature": signature}, indent=1, sort_keys=True, ensure_ascii=True).encode() + b"\n"
    )


@dataclass(frozen=True, slots=True)
class Verified:
    """A report that holds. Args: public_key: base64 of who signed it; "" when nobody did."""

    report: Report
    level: Level
    next_needs: str
    public_key: str


def verify(data: bytes, public_key: Ed25519PublicKey | None = None) -> Verified:
    """Read a report, check its signature, and judge its results anew.

    Args:
        public_key: who must have signed it; without it, whoever is named in it must have.

    Raises:
        InvalidArgument: it is no report, contradicts itself, or is of a suite that does not count any more.
        NotAuthorized: the signature is missing, wrong, or somebody else's.
    """
    document = _read(data)
    signature = document.pop("signature", None)
    signer = _check_signature(document, signature, public_key)
    report = _report(document)
    level, next_needs = report.judged
    if document["level"] != level:
        raise InvalidArgument(f"the report says {str(document['level'])[:10]!r}, its results earn {str(level)!r}")
    return Verified(report, level, next_needs, signer)


def _read(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise InvalidArgument(f"a report has at most {MAX_BYTES >> 20} MiB")
    try:
        found = json.loads(data, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"the file is no report: {str(error)[:100]}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InvalidArgument(f"the file is no report of format {FORMAT}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text[:20]} has no place in a report")


def _check_signature(document: dict[str, Any], signature: Any, wanted: Ed25519PublicKey | None) -> str:
    if not isinstance(signature, dict):
        raise InvalidArgument("the report has no word about its signature")
    if signature.get("algorithm") == "unsigned":
        if wanted is not None:
            raise NotAuthorized("the report is unsigned")
        return ""
    if signature.get("algorithm") != "ed25519":
        raise InvalidArgument("the report is signed in a way that is not known")
    try:
        raw = base64.b64decode(signature["public_key"], validate=True)
        value = base64.b64decode(signature["value"], validate=True)
        key = Ed25519PublicKey.from_public_bytes(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument("the report's signature is none") from error
    if wanted is not None and wanted.public_bytes_raw() != raw:
        raise NotAuthorized("the report is signed with another key")
    try:
        key.verify(value, canonical(document))
    except InvalidSignature:
        raise NotAuthorized("the signature does not fit the report: it was changed after it was signed") from None
    return base64.b64encode(raw).decode()


def _report(document: dict[str, Any]) -> Report:
    names = {"format", "level", "next", "backend", "device", "host", "suite", "expected"}
    names |= {"seed", "examples", "reproduced", "made", "results"}
    if set(document) != names:
        raise InvalidArgument(f"the report's fields are not those of format {FORMAT}")
    texts = {name: _texts(name, document[name]) for name in ("backend", "device", "host", "suite", "expected")}
    seed, examples = document["seed"], document["examples"]
    numbers = all(isinstance(each, int) and not isinstance(each, bool) for each in (seed, examples))
    if not numbers or not isinstance(document["reproduced"], bool) or not 0 < examples <= 100000:
        raise InvalidArgument("the report's seed, number of examples or reproduction is none")
    if not isinstance(document["made"], str) or not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", document["made"]):
        raise InvalidArgument("the report has no date")
    suite = texts["suite"]
    if set(suite) != {"version", "sha256"} or not _HEX.fullmatch(suite["sha256"]):
        raise InvalidArgument("the report does not say which suite it is of")
    if not _VERSION.fullmatch(suite["version"]) or suite["version"].split(".")[0] != VERSION.split(".")[0]:
        raise InvalidArgument(f"the report is of suite {suite['version'][:20]}, this is {VERSION}: certify again")
    if not {"name", "version"} <= set(texts["backend"]) <= _WHO or not texts["device"].get("name"):
        raise InvalidArgument("the report does not say what was certified")
    listed = document["results"]
    if not isinstance(listed, list) or len(listed) > MAX_RESULTS:
        raise InvalidArgument("the report has no list of results")
    results = tuple(_result(each) for each in listed)
    expected = {result.case for result in results if result.outcome == Outcome.EXPECTED}
    if not expected <= set(texts["expected"]):
        raise InvalidArgument("a failure is called expected, and no reason is given")
    return Report(
        texts["backend"],
        texts["device"],
        texts["host"],
        suite,
        seed,
        examples,
        document["reproduced"],
        document["made"],
        results,
        texts["expected"],
    )


def _texts(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_RESULTS:
        raise InvalidArgument(f"the report's {name} is none")
    if not all(isinstance(each, str) and len(each) <= 1000 for each in value.values()):
        raise InvalidArgument(f"the report's {name} is not made of texts")
    return value


def _result(value: Any) -> Result:
    try:
        case, detail, examples, supported = (value[each] for each in ("case", "detail", "examples", "supported"))
        outcome = Outcome(value["outcome"])
        right = isinstance(detail, str) and isinstance(case, str) and _CASE.fullmatch(case) and len(value) == 5
        counts = type(examples) is int and type(supported) is int and 0 <= supported <= examples
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument("a result of the report is none") from error
    if not right or not counts:
        raise InvalidArgument("a result of the report is none")
    return Result(case, outcome, detail, examples, supported)


def new_key(path: Path) -> Ed25519PublicKey:
    """Make a key to sign with, in a file that only its owner can read, and beside it the public one (`public_path`).

    Raises:
        AlreadyExists: one of the files is there; a key is never overwritten.
        InvalidArgument: the file's name is that of a public key.
    """
    if not path.name or (public := public_path(path)) == path:
        raise InvalidArgument(f"{path} is no name for a key", hint="name the file such as vendor.pem")
    if public.exists():
        raise AlreadyExists(f"{public.name} exists", hint="give another file: a key is never overwritten")
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise AlreadyExists(f"{path.name} exists", hint="give another file: a key is never overwritten") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
        made = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        public.write_bytes(key.public_key().public_bytes(*made))
    except OSError:
        path.unlink()  # half a key is none
        raise
    return key.public_key()


def public_path(path: Path) -> Path:
    """Where the public key of a key's file is: vendor.pub beside vendor.pem."""
    return path.with_suffix(".pub")


def read_key(path: Path) -> Ed25519PrivateKey:
    """Raises InvalidArgument: the file holds no Ed25519 key, or one with a password."""
    try:
        with path.open("rb") as file:
            key = serialization.load_pem_private_key(file.read(1 << 16), None)
    except (ValueError, TypeError) as error:
        raise InvalidArgument(
            f"{path.name} holds no key to sign with", hint="ai-assistant hal keygen makes one"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidArgument(f"{path.name} holds a key of another kind", hint="ai-assistant hal keygen makes one")
    return key


def public_text(key: Ed25519PublicKey) -> str:
    """As it stands in reports and in the support list: base64 of its 32 bytes."""
    return base64.b64encode(key.public_bytes_raw()).decode()


def read_public(text: str) -> Ed25519PublicKey:
    """A public key from base64, or from a PEM file's path. Raises InvalidArgument."""
    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))
    except ValueError:
        pass
    try:
        with Path(text).open("rb") as file:
            pem = file.read(1 << 16)
        if b"PRIVATE KEY-----" in pem:
            raise InvalidArgument(
                "that is the private key",
                hint=f"the public one is in {public_path(Path(text)).name}, and keygen printed it",
                param="public-key",
            )
        key = serialization.load_pem_public_key(pem)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidArgument("that is no public key: give its base64, or a PEM file", param="public-key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidArgument("the public key is of another kind than Ed25519", param="public-key")
    return key
