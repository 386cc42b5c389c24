"""The official support list, hal/registry.toml: backends whose certification is published with the product."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.errors import InvalidConfig
from ai_assistant.hal.conformance.levels import Level
from ai_assistant.hal.conformance.report import Verified, read_public, verify

ROOM = Path(__file__).parent.parent
REGISTRY = ROOM / "registry.toml"
_FIELDS = {"backend", "vendor", "level", "report", "public_key"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the list. Args: report: a file in hal/reports; public_key: base64 of who answers for it."""

    backend: str
    vendor: str
    level: Level
    report: str
    public_key: str


def read(path: Path = REGISTRY) -> tuple[Entry, ...]:
    """Raises InvalidConfig: the file breaks its own rules."""
    try:
        found = tomllib.loads(path.read_text())
        listed = found.get("supported", [])
        entries = []
        for row in listed:
            if set(row) != _FIELDS or not all(isinstance(value, str) and value for value in row.values()):
                raise ValueError(f"an entry has exactly the texts {', '.join(sorted(_FIELDS))}")
            if row["report"] != Path(row["report"]).name:
                raise ValueError(f"{row['report'][:60]!r} is no file in hal/reports")
            entries.append(Entry(row["backend"], row["vendor"], Level(row["level"]), row["report"], row["public_key"]))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InvalidConfig(f"{path.name}: {error}") from error
    if set(found) - {"supported"}:
        raise InvalidConfig(f"{path.name} has something else than [[supported]]")
    names = [entry.backend for entry in entries]
    if len(set(names)) != len(names):
        raise InvalidConfig(f"{path.name} names a backend twice")
    return tuple(entries)


def check(entry: Entry, folder: Path = ROOM / "reports") -> Verified:
    """Whether an entry is true.

    Raises:
        InvalidConfig: its report is missing, or of another backend or level.
        InvalidArgument, NotAuthorized: as `report.verify`.
    """
    try:
        data = (folder / entry.report).read_bytes()
    except OSError as error:
        raise InvalidConfig(f"the report of {entry.backend} cannot be read: {error.strerror}") from error
    verified = verify(data, read_public(entry.public_key))
    if verified.report.backend["name"] != entry.backend:
        raise InvalidConfig(f"the report of {entry.backend} is of {verified.report.backend['name'][:60]}")
    if verified.level != entry.level or entry.level is Level.NONE:
        raise InvalidConfig(f"{entry.backend} is listed as {entry.level}, its report earns {verified.level}")
    return verified
