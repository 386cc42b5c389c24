"""The running system against the published values: its command line, and the verity hash under its root.

What a system says about itself is worth as much as the system: these checks find mistakes, the TPM's find lies.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ai_assistant.tee.measurements import Measurements
from ai_assistant.tee.report import Check, differs, information, published

_HINT = "boot again; if it stays, the boot menu or the firmware starts something else than the release"


@dataclass(frozen=True, slots=True)
class Root:
    """What / is mounted from; ``table`` is the device-mapper's line, empty where there is none."""

    source: str
    table: str


@dataclass(frozen=True, slots=True)
class Running:
    """``uki`` is the booted image's file name without boot counters, empty where nothing says it."""

    command_line: str
    root: Root
    uki: str


def verity_hash(table: str) -> str | None:
    """The root hash of a dm-verity target's table line (``0 SIZE verity 1 DATA HASH … sha256 ROOT SALT …``)."""
    lines = table.strip().splitlines()
    words = lines[0].split() if len(lines) == 1 else []
    return words[11].lower() if len(words) >= 13 and words[2] == "verity" else None


def check(running: Running, expected: Measurements) -> list[Check]:
    checks = [_command_line(running.command_line, expected), _root(running.root, expected)]
    if running.uki and running.uki != expected.uki:
        checks.append(
            information(
                "uki-name", "unified kernel image", None, f"booted as {running.uki}, published as {expected.uki}"
            )
        )
    return checks


def _command_line(found: str, expected: Measurements) -> Check:
    component = "command line of the running kernel"
    if found.strip() == expected.command_line.strip():
        return published("command-line", component, None, "the published one")
    have, want = Counter(found.split()), Counter(expected.command_line.split())
    parts = [
        *(f"added: {word}" for word in have - want),
        *(f"missing: {word}" for word in want - have),
    ]
    words = "; ".join(parts[:20]) or "the same words in another order"
    return differs(
        "command-line",
        component,
        None,
        expected=expected.command_line,
        found=words,
        meaning="The kernel runs with another command line than the release's, which can switch its protection off.",
        hint=_HINT,
    )


def _root(root: Root, expected: Measurements) -> Check:
    component = "root file system"
    found = verity_hash(root.table)
    if found == expected.root_hash:
        return published("root", component, None, f"verity, {found}")
    return differs(
        "root",
        component,
        None,
        expected=f"dm-verity with root hash {expected.root_hash}",
        found=f"dm-verity with root hash {found}" if found is not None else f"{root.source}, without dm-verity",
        meaning="The root file system is verified, but it is another one than the release's."
        if found is not None
        else "The root file system is not verified block by block as it is read: anybody who can write to the disk can "
        "change it.",
        hint=_HINT,
    )
