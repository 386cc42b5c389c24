"""PCR 7: was Secure Boot on, with which keys, and by which of them was each program admitted?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ai_assistant.tee.eventdata import Variable, signatures, subject, text, variable
from ai_assistant.tee.eventlog import Event, EventType
from ai_assistant.tee.measurements import Measurements, PublishedVariable
from ai_assistant.tee.report import Check, differs, information, published

PCR = 7
# The PC Client profile allows both; anything else is the firmware's way to say that it failed.
SEPARATORS = tuple(hashlib.sha256(data).digest() for data in (b"\0\0\0\0", b"\xff\xff\xff\xff"))
_UNKNOWN = "not known to this firmware"
_IN_WORDS = {
    "PK": "platform key (PK)",
    "KEK": "key exchange keys (KEK)",
    "db": "allowed signers (db)",
}


def is_on(events: Sequence[Event], expected: Measurements) -> bool:
    """Whether the firmware measured the published state, Secure Boot on."""
    digests = {each.digest for each in expected.variables if each.name == "SecureBoot"}
    return any(event.digest in digests for event in events if event.pcr == PCR)


def check(events: Sequence[Event], expected: Measurements) -> list[Check]:
    """Compare the events of PCR 7 with the published ones."""
    configured = [
        (event, variable(event.data)) for event in events if event.type == EventType.EFI_VARIABLE_DRIVER_CONFIG
    ]
    setup_mode = any(
        found is not None and found.name == "PK" and not found.content and event.genuine for event, found in configured
    )
    checks = [_variable(each, configured, setup_mode) for each in expected.variables]
    checks += _authority(events, expected, is_on(events, expected))
    known = {each.name for each in expected.variables}
    for event, found in configured:
        if found is not None and found.name not in known:
            checks.append(information(f"variable-{found.name}", _others(found), PCR, _content(found, event)))
    return [*checks, *_actions(events), *_separator(events)]


def _variable(
    expected: PublishedVariable, configured: Sequence[tuple[Event, Variable | None]], setup_mode: bool
) -> Check:
    named = [
        (event, found)
        for event, found in configured
        if (found is not None and (found.name, found.guid) == (expected.name, expected.guid))
        or event.digest == expected.digest
    ]
    wrong = [(event, found) for event, found in named if event.digest != expected.digest]
    name = "secure-boot" if expected.name == "SecureBoot" else expected.name.lower()
    component = _IN_WORDS.get(expected.name, "Secure Boot" if name == "secure-boot" else expected.name)
    if named and not wrong:
        return published(name, component, PCR, "on" if name == "secure-boot" else "the published keys")
    found = "; ".join(_content(variable, event) for event, variable in wrong[:4]) or "nothing was measured"
    if name == "secure-boot":
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


def _content(found: Variable | None, event: Event) -> str:
    if not event.genuine:
        return f"measured as {event.digest.hex()}, but the log's text about it is not what was measured"
    assert found is not None
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
    foreign = [event for event in used if event.digest not in expected.authority]
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
    checks = []
    for event in events:
        if event.type != EventType.EFI_ACTION:
            continue
        said = text(event)
        if event.genuine and said == "UEFI Debug Mode":
            checks.append(
                differs(
                    "firmware-debug",
                    "firmware",
                    PCR,
                    expected="no debugger",
                    found=said,
                    meaning="The firmware was started with its debugger on: whoever is attached to it can change "
                    "everything that follows.",
                    hint="switch the debugger off in the firmware setup, or ask the maker of the board",
                )
            )
        else:
            checks.append(information("firmware-action", "firmware", PCR, said))
    return checks


def _separator(events: Sequence[Event]) -> list[Check]:
    found = [event for event in events if event.type == EventType.SEPARATOR]
    if len(found) == 1 and found[0].digest in SEPARATORS:
        return []
    return [
        differs(
            "separator-7",
            "firmware",
            PCR,
            expected="one separator between the firmware and what it starts",
            found=f"{len(found)} separators" if len(found) != 1 else "a separator that reports an error",
            meaning="The firmware failed while it measured Secure Boot, or somebody else wrote into PCR 7.",
            hint="boot again; if it stays, look for newer firmware of the board",
        )
    ]
