"""PCR 7: was Secure Boot on, with which keys, and by which of them was each program admitted?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ai_assistant.tee.eventdata import (
    SEPARATORS,
    Variable,
    ends_firmware,
    firmwares,
    is_text,
    signatures,
    subject,
    text,
    variable,
)
from ai_assistant.tee.eventlog import Event, EventType
from ai_assistant.tee.measurements import Measurements, PublishedVariable
from ai_assistant.tee.report import Check, differs, information, published

PCR = 7
_DEBUG = b"UEFI Debug Mode"
_ACTIONS = (_DEBUG, b"DMA Protection Disabled")
_UNKNOWN = "not known to this firmware"
_IN_WORDS = {
    "PK": "platform key (PK)",
    "KEK": "key exchange keys (KEK)",
    "db": "allowed signers (db)",
}


@dataclass(frozen=True, slots=True)
class _Configured:
    """An event that the log calls the firmware's configuration; ``early`` is before the separator, where only the
    firmware itself can have measured it."""

    event: Event
    found: Variable | None
    early: bool

    @property
    def good(self) -> bool:
        return self.early and self.found is not None and self.event.genuine

    def is_of(self, expected: PublishedVariable) -> bool:
        named = self.found is not None and (self.found.name, self.found.guid) == (expected.name, expected.guid)
        return named or self.event.digest == expected.digest


def _configured(events: Sequence[Event]) -> list[_Configured]:
    early = firmwares(events)
    return [
        _Configured(event, variable(event.data), place < early)
        for place, event in enumerate(events)
        if event.type == EventType.EFI_VARIABLE_DRIVER_CONFIG
    ]


def is_on(events: Sequence[Event], expected: Measurements) -> bool:
    """Whether the firmware measured the published state, Secure Boot on."""
    digests = {each.digest for each in expected.variables if each.name == "SecureBoot"}
    return any(each.good and each.event.digest in digests for each in _configured(events))


def check(events: Sequence[Event], expected: Measurements) -> list[Check]:
    """Compare the events of PCR 7 with the published ones.

    The log may call an event what it likes. Each has to be what was measured, to be of a kind that belongs into
    PCR 7, and to stand on its kind's side of the separator: configuration before it, signers after it.
    """
    configured = _configured(events)
    setup_mode = any(
        each.good and each.found is not None and each.found.name == "PK" and not each.found.content
        for each in configured
    )
    checks = [_variable(each, configured, setup_mode) for each in expected.variables]
    checks += _authority(events, expected, is_on(events, expected))
    for each in configured:
        if any(each.is_of(published) for published in expected.variables):
            continue
        if each.good and each.found is not None:
            name = f"variable-{each.found.name}"
            checks.append(information(name, _others(each.found), PCR, _content(each)))
        else:
            checks.append(_foreign(each.event))
    return [*checks, *_actions(events), *_separator(events)]


def _variable(expected: PublishedVariable, configured: Sequence[_Configured], setup_mode: bool) -> Check:
    named = [each for each in configured if each.is_of(expected)]
    wrong = [each for each in named if not each.good or each.event.digest != expected.digest]
    if len(named) > 1:  # which one counts, nobody can tell
        wrong = named
    name = "secure-boot" if expected.name == "SecureBoot" else expected.name.lower()
    component = _IN_WORDS.get(expected.name, "Secure Boot" if name == "secure-boot" else expected.name)
    if named and not wrong:
        return published(name, component, PCR, "on" if name == "secure-boot" else "the published keys")
    found = "; ".join(_content(each) for each in wrong[:4]) or "nothing was measured"
    if len(named) > 1:
        found = f"measured {len(named)} times: {found}"
    if name == "secure-boot":
        if any(each.event.digest == expected.digest for each in named):
            return _unproven(name, component, found)
        return _off(name, component, found, setup_mode)
    return differs(
        name,
        component,
        PCR,
        expected=f"the release's own keys, measured as {expected.digest.hex()}",
        found=found,
        meaning="Programs signed by other keys than the release's may start on this machine, or nothing enrolled "
        "the release's keys: what the firmware admits is not what the release expects.",
        hint="in the firmware setup, put Secure Boot into setup mode (clear the keys) and boot the image again: it "
        "enrols its own keys",
    )


def _unproven(name: str, component: str, found: str) -> Check:
    return differs(
        name,
        component,
        PCR,
        expected="on, measured once, by the firmware before it started anything",
        found=found,
        meaning="Nothing shows that Secure Boot was on: a program that was started with Secure Boot off could have "
        "measured this itself, and the event log tells it as if it were the firmware's.",
        hint="look whether Secure Boot is on in the firmware setup; boot again, and take log and values anew",
    )


def _off(name: str, component: str, found: str, setup_mode: bool) -> Check:
    if _UNKNOWN in found:
        meaning = (
            "This firmware has no Secure Boot: it starts any program, and whoever can write to the boot partition can "
            "replace what boots. The measurements still show what was started."
        )
        hint = "look for newer firmware of the board; in a virtual machine, choose firmware with Secure Boot"
    elif setup_mode:
        meaning = (
            "Secure Boot is off and in setup mode: no platform key is enrolled, so the firmware starts any program, "
            "and whoever can write to the boot partition can replace what boots."
        )
        hint = "boot the image once more: its boot loader enrols the release's keys by itself and restarts"
        found = f"{found}, in setup mode"
    else:
        meaning = (
            "Secure Boot is off: the firmware starts any program, signed or not. The measurements still show what "
            "was started, but a program before ours could have repeated published values into PCR 11."
        )
        hint = "switch Secure Boot on in the firmware setup, and boot again"
    return differs(name, component, PCR, expected="on", found=found, meaning=meaning, hint=hint)


def _content(configured: _Configured) -> str:
    event, found = configured.event, configured.found
    if not event.genuine or found is None:
        return f"measured as {event.digest.hex()}, but the log's text about it is not what was measured"
    return _value(event, found) + ("" if configured.early else ", measured after the firmware was done")


def _value(event: Event, found: Variable) -> str:
    if found.name == "SecureBoot":
        return {b"": _UNKNOWN, b"\0": "off", b"\1": "on"}.get(found.content, "neither on nor off")
    if not found.content:
        return "empty"
    entries = signatures(found.content)
    if not entries:
        return f"{len(found.content)} bytes, measured as {event.digest.hex()}"
    shown = ", ".join(entries[:4]) + (", …" if len(entries) > 4 else "")
    return f"{len(entries)} entries: {shown}" if len(entries) > 1 else shown


def _others(found: Variable) -> str:
    return "revoked signers (dbx)" if found.name == "dbx" else f"variable {found.name}"


def _authority(events: Sequence[Event], expected: Measurements, on: bool) -> list[Check]:
    component = "signer of what was started"
    used = [event for event in events if event.type == EventType.EFI_VARIABLE_AUTHORITY]
    early = {event.number for event in events[: firmwares(events)]}
    foreign = [
        event for event in used if event.digest not in expected.authority or not event.genuine or event.number in early
    ]
    if not used and not on:
        return []
    if used and not foreign:
        return [published("authority", component, PCR, "the release's key")]
    found = "; ".join(_signer(event) for event in foreign[:4]) or "no signer was measured"
    return [
        differs(
            "authority",
            component,
            PCR,
            expected="the release's key, " + " or ".join(digest.hex() for digest in expected.authority),
            found=found,
            meaning="The firmware started a program that was admitted by another key than the release's, or by none."
            if foreign
            else "Secure Boot is on, but the firmware says of no program by which key it was admitted.",
            hint="look which program that was among those of PCR 4; clear the keys in the firmware setup, and let the "
            "image enrol its own",
        )
    ]


def _signer(event: Event) -> str:
    found = variable(event.data)
    if found is None or not event.genuine:
        return f"measured as {event.digest.hex()}"
    # An entry of a signature list: its owner, then the certificate.
    return f"{found.name}: {subject(found.content[16:]) or event.digest.hex()}"


def _actions(events: Sequence[Event]) -> list[Check]:
    """All that is neither configuration, nor a signer, nor the separator."""
    checks = []
    for event in events:
        if event.type in _KINDS or ends_firmware(event):
            continue
        if event.type != EventType.EFI_ACTION or not event.genuine or not is_text(event, *_ACTIONS):
            checks.append(_foreign(event))
        elif is_text(event, _DEBUG):
            checks.append(
                differs(
                    "firmware-debug",
                    "firmware",
                    PCR,
                    expected="no debugger",
                    found=text(event),
                    meaning="The firmware was started with its debugger on: whoever is attached to it can change "
                    "everything that follows.",
                    hint="switch the debugger off in the firmware setup, or ask the maker of the board",
                )
            )
        else:
            checks.append(information("firmware-action", "firmware", PCR, text(event)))
    return checks


_KINDS = (EventType.EFI_VARIABLE_DRIVER_CONFIG, EventType.EFI_VARIABLE_AUTHORITY, EventType.SEPARATOR)


def _foreign(event: Event) -> Check:
    words = "" if event.genuine else ", but the log's text about it is not what was measured"
    return differs(
        "foreign-event-7",
        "something else measured as Secure Boot",
        PCR,
        expected="the configuration, one separator, then signers",
        found=f"event of type {event.type:#x}: {text(event)} {event.digest.hex()}{words}",
        meaning="PCR 7 holds what does not belong there, or what the event log calls by another name: a forged log can "
        "hide a boot with Secure Boot off in this way.",
        hint="boot again and take log and values anew; if it stays, look for newer firmware of the board, and do not "
        "trust this machine",
    )


def _separator(events: Sequence[Event]) -> list[Check]:
    found = [event for event in events if event.type == EventType.SEPARATOR or ends_firmware(event)]
    if len(found) != 1:
        words = f"{len(found) or 'no'} separators"
    elif found[0].type != EventType.SEPARATOR or not found[0].genuine:
        words = "a separator that the log tells something else of"
    elif found[0].data not in SEPARATORS:
        words = "a separator that reports an error"
    else:
        return []
    return [
        differs(
            "separator-7",
            "firmware",
            PCR,
            expected="one separator between the firmware and what it starts",
            found=words,
            meaning="The firmware failed while it measured Secure Boot, or somebody else wrote into PCR 7.",
            hint="boot again; if it stays, look for newer firmware of the board",
        )
    ]
