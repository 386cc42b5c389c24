"""PCR 11, 12 and 13: what the unified kernel image held, how far the boot got, and what was added to it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ai_assistant.tee.eventdata import clean, text
from ai_assistant.tee.eventlog import ZERO, Event, EventType, Extension
from ai_assistant.tee.measurements import Measurements
from ai_assistant.tee.report import Check, differs, information, published

PCR, ADDITIONS, SYSEXTS = 11, 12, 13
# systemd-pcrphase's words, in the only order in which one boot says them.
PHASES = ("enter-initrd", "leave-initrd", "sysinit", "ready", "shutdown", "final")
# The file system that could still be asked to open /var has been left after this many.
_BOOTED = 2
_IN_WORDS = {
    ".linux": "the kernel",
    ".osrel": "the name and version of the release",
    ".cmdline": "the kernel's command line, which holds the hash of the root file system",
    ".initrd": "the initial file system, which opens the root file system and /var",
    ".ucode": "the processor's microcode",
    ".uname": "the kernel's version",
    ".sbat": "the revocation data of the boot programs",
    ".pcrpkey": "the key whose signatures open /var",
}
_HINT = (
    "if you did not change it yourself, do not trust this machine: write the release to its disk again, and compare "
    "with its measurements.json"
)


@dataclass(frozen=True, slots=True)
class Outcome:
    checks: list[Check]
    phases: tuple[str, ...]


def check(
    events: Sequence[Event], extensions: Sequence[Extension] | None, value: bytes, expected: Measurements
) -> Outcome:
    """Judge PCR 11 by its value; the logs only explain it. ``extensions`` are all of the running system's, or None
    where it has no log."""
    measured = _sections(events, expected)
    reached = _reached(value, expected)
    if reached is not None:
        checks = [published("uki-contents", "contents of the unified kernel image", PCR, f"{expected.uki}")]
        checks.append(_phase(reached))
        return Outcome(checks, reached)
    said = None if extensions is None else [each for each in extensions if each.pcr == PCR]
    checks = _changed(measured, expected)
    if said is not None:
        checks += _illegal(said)
    if not checks:
        checks.append(_unexplained(value, expected, no_log=said is None))
    return Outcome(checks, ())


def _reached(value: bytes, expected: Measurements) -> tuple[str, ...] | None:
    for count in range(len(PHASES), -1, -1):
        if expected.pcr11_at(PHASES[:count]) == value:
            return PHASES[:count]
    return None


def _phase(reached: tuple[str, ...]) -> Check:
    found = " → ".join(reached) or "none"
    if len(reached) >= _BOOTED:
        more = "" if "ready" in reached else "; not yet ready, or systemd-pcrphase.service did not run"
        return information("phases", "phases of the boot", PCR, found + more)
    return differs(
        "phases",
        "phases of the boot",
        PCR,
        expected=" → ".join(PHASES[:_BOOTED]) + ", and further",
        found=found,
        meaning="The system runs, but the TPM was not told that the initial file system has been left: it would still "
        "open /var for whoever asks.",
        hint="journalctl -u 'systemd-pcrphase*' says why",
    )


def _sections(events: Sequence[Event], expected: Measurements) -> dict[str, bytes]:
    """The sections that the stub measured, as far as the log's names hash to what was measured."""
    known = {_named(section.name): section.name for section in expected.sections}
    found: dict[str, bytes] = {}
    stub = [event for event in events if event.type == EventType.IPL]
    for name, content in zip(stub[::2], stub[1::2], strict=False):
        title = known.get(name.digest)
        if title is None and _named(text(name)) == name.digest:
            title = text(name)
        found.setdefault(title or f"unknown section {len(found) + 1}", content.digest)
    return found


def _named(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="replace") + b"\0").digest()


def _changed(measured: Mapping[str, bytes], expected: Measurements) -> list[Check]:
    wanted = {section.name: section.digest for section in expected.sections}
    if not measured:
        return [
            _section("uki-contents", "contents of the unified kernel image", "its sections", "the stub measured none")
        ]
    checks = []
    for name, digest in wanted.items():
        found = measured.get(name)
        if found != digest:
            words = found.hex() if found is not None else "not there"
            checks.append(_section(f"section{name}", _component(name), digest.hex(), words))
    for name, digest in measured.items():
        if name not in wanted:
            checks.append(_section("section-unknown", _component(name), "no such section", digest.hex()))
    if not checks and list(measured) != list(wanted):
        checks.append(_section("section-order", "order of the sections", ", ".join(wanted), ", ".join(measured)))
    return checks


def _component(name: str) -> str:
    return f"{name} in the unified kernel image"


def _section(name: str, component: str, expected: str, found: str) -> Check:
    what = _IN_WORDS.get(component.split(" ", 1)[0], "a part of the unified kernel image")
    return differs(
        name,
        component,
        PCR,
        expected=expected,
        found=found,
        meaning=f"Not the release's: {what}.",
        hint=_HINT,
    )


def _illegal(said: Sequence[Extension]) -> list[Check]:
    words = {hashlib.sha256(phase.encode()).digest(): phase for phase in PHASES}
    path = [words.get(each.digest, f"something else ({clean(each.text[:60]) or each.digest.hex()})") for each in said]
    legal = path == list(PHASES[: len(path)])
    if legal:
        return []
    missing = [phase for phase in PHASES[: PHASES.index(path[-1])] if phase not in path] if path[-1] in PHASES else []
    twice = [phase for phase in PHASES if path.count(phase) > 1]
    others = [each for each in path if each not in PHASES]
    why = [
        *([f"missing: {', '.join(missing)}"] if missing else []),
        *([f"twice: {', '.join(twice)}"] if twice else []),
        *([f"not ours: {', '.join(others[:4])}"] if others else []),
    ]
    return [
        differs(
            "phases",
            "phases of the boot",
            PCR,
            expected=" → ".join(PHASES[:4]),
            found=" → ".join(path[:12]) + ("; " + "; ".join(why) if why else "; in another order"),
            meaning="The system went through other phases than a boot does: a service was left out or restarted, the "
            "system was started again without a reboot, or somebody else wrote into PCR 11.",
            hint="journalctl -u 'systemd-pcrphase*' shows who did; boot again",
        )
    ]


def _unexplained(value: bytes, expected: Measurements, *, no_log: bool) -> Check:
    hint = (
        "the system's own log is missing, which names the phases: /run/log/systemd/tpm2-measure.log"
        if no_log
        else "boot again; if it stays, save the evidence (--save DIR) and do not trust this machine"
    )
    return differs(
        "uki-contents",
        "contents of the unified kernel image",
        PCR,
        expected=expected.pcr11_at(PHASES[:4]).hex() + " (when ready)",
        found=value.hex(),
        meaning="By the logs the release's unified kernel image was started, but the TPM holds another value: more "
        "was measured than the logs say.",
        hint=hint,
    )


def check_additions(events: Sequence[Event], value: bytes, expected: Measurements) -> Check:
    """PCR 12: nothing may be added to the command line, no credentials, no add-ons."""
    component = "additions to the command line"
    if value == expected.pcr12:
        return published("additions", component, ADDITIONS, "nothing was added")
    added = [_addition(event) for event in events]
    return differs(
        "additions",
        component,
        ADDITIONS,
        expected="nothing" if expected.pcr12 == ZERO else expected.pcr12.hex(),
        found="; ".join(added[:6]) or f"something that is not in the event log ({value.hex()})",
        meaning="Something beside the unified kernel image reached the kernel or the initial file system: it can "
        "change what the release does.",
        hint="remove it where it comes from: the boot menu's editor, *.addon.efi and *.cred files on the boot "
        "partition, or the machine's SMBIOS strings",
    )


def _addition(event: Event) -> str:
    said = text(event)
    if event.type == EventType.EVENT_TAG:
        return said
    if said in ("Credentials initrd", "Global credentials initrd"):
        return f"credentials from the boot partition ({said})"
    if "extension initrd" in said:
        return f"a system extension from the boot partition ({said})"
    # Of a command line, the log has the text with a NUL, and the TPM the hash of the text without.
    genuine = hashlib.sha256(event.data[:-2]).digest() == event.digest
    return f"the command line “{said}”" if genuine else f"by the log's word: {said}"


def check_extensions(events: Sequence[Event], value: bytes) -> Check:
    """PCR 13: no system extension may be laid over the initial file system."""
    component = "system extensions"
    if value == ZERO:
        return information("extensions", component, SYSEXTS, "none")
    return differs(
        "extensions",
        component,
        SYSEXTS,
        expected="none",
        found="; ".join(text(event) for event in events[:6]) or f"something that no log names ({value.hex()})",
        meaning="Files from the boot partition were laid over the initial file system: programs that are not the "
        "release's may have run before the root file system was opened.",
        hint="remove *.raw files beside the unified kernel image on the boot partition, and boot again",
    )
