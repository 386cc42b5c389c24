"""PCR 4: which EFI programs were started; and PCR 2, where drivers are that a boot loader brought along."""

from __future__ import annotations

from collections.abc import Sequence

from ai_assistant.tee.eventdata import firmwares, from_firmware, harmless, image_path, is_words, text
from ai_assistant.tee.eventlog import Event, EventType
from ai_assistant.tee.measurements import Measurements, Program
from ai_assistant.tee.report import Check, differs, information, published

PCR, DRIVERS = 4, 2
_DRIVERS = (EventType.EFI_BOOT_SERVICES_DRIVER, EventType.EFI_RUNTIME_SERVICES_DRIVER)
_MEANINGS = {
    "boot loader": "Another boot loader was started than the release's: it decides what runs next.",
    "unified kernel image": "Another unified kernel image was started than the release's: another kernel, initial file "
    "system or command line.",
    "kernel inside it": "Another kernel was started than the one in the release's unified kernel image.",
}
_HINT = (
    "if you did not change it yourself, do not trust this machine: write the release to its disk again "
    "(image/flash, or ai-assistant install), and compare with its measurements.json"
)


def check(events: Sequence[Event], expected: Measurements, *, secure_boot: bool) -> list[Check]:
    """Compare the events of PCR 4 with the published programs. ``secure_boot`` is whether PCR 7 says that it is on."""
    started = [event for event in events if event.type == EventType.EFI_BOOT_SERVICES_APPLICATION]
    digests = {program.digest for program in expected.programs}
    foreign = [event for event in started if event.digest not in digests]
    checks: list[Check] = []
    for what in dict.fromkeys(program.what for program in expected.programs):
        alternatives = [program for program in expected.programs if program.what == what]
        if any(event.digest == program.digest for event in started for program in alternatives):
            checks.append(published(_id(what), what, PCR, alternatives[0].file or alternatives[0].digest.hex()))
        elif all(program.secure_boot in (None, secure_boot) for program in alternatives):
            instead = _instead(foreign, alternatives)
            foreign = [event for event in foreign if event is not instead]
            checks.append(_replaced(what, alternatives, instead))
    own = {event.number for event in events[: firmwares(events)] if from_firmware(event.data)}
    for event in foreign:
        checks.append(_own(event) if event.number in own else _foreign(event))
    return [*checks, *_order(started, expected), *_rest(events)]


def _id(what: str) -> str:
    return what.replace(" ", "-")


def _instead(foreign: Sequence[Event], alternatives: Sequence[Program]) -> Event | None:
    """The program that stood in the place of a published one: of the same file, else in the same folder. What is
    published without a file, the kernel, is started from memory."""
    others = [event for event in foreign if not from_firmware(event.data)]
    for depth in (0, 1):
        places = {_place(program.file, depth) for program in alternatives if program.file or not depth}
        for event in others:
            if _place(_file(event), depth) in places:
                return event
    return None


def _file(event: Event) -> str:
    """The path on the boot partition, without the partition; empty for a program from memory."""
    path = image_path(event.data) or ""
    return path[path.index("\\") :] if "\\" in path else ""


def _place(file: str, depth: int) -> tuple[str, ...]:
    parts = [part for part in file.lower().replace("\\", "/").split("/") if part]
    return tuple(parts[: len(parts) - depth])


def _replaced(what: str, alternatives: Sequence[Program], instead: Event | None) -> Check:
    return differs(
        _id(what),
        what,
        PCR,
        expected=" or ".join(f"{program.file} {program.digest.hex()}".strip() for program in alternatives),
        found=f"{text(instead)} {instead.digest.hex()}" if instead is not None else "it was not started",
        meaning=_MEANINGS.get(what, f"Another {what} was started than the release's."),
        hint=_HINT,
    )


def _own(event: Event) -> Check:
    # With Secure Boot on, the firmware admits nothing else before it looks for a boot loader.
    return information("firmware-program", "firmware", PCR, f"started a program of its own: {text(event)}")


def _foreign(event: Event) -> Check:
    return differs(
        "foreign-program",
        "EFI program that is not of the release",
        PCR,
        expected="no other program than the release's",
        found=f"{text(event)} {event.digest.hex()}",
        meaning="Before or besides the release's programs another one was started: a shell, a tool, another boot "
        "loader, or something hostile. It could do anything.",
        hint="look into the firmware's boot order and at the boot partition; remove what does not belong there, and "
        "boot again",
    )


def _order(started: Sequence[Event], expected: Measurements) -> list[Check]:
    first: dict[str, int] = {}
    for place, event in enumerate(started):
        for program in expected.programs:
            if program.digest == event.digest:
                first.setdefault(program.what, place)
    wanted = [what for what in dict.fromkeys(program.what for program in expected.programs) if what in first]
    found = sorted(wanted, key=first.__getitem__)
    if wanted == found:
        return []
    return [
        differs(
            "program-order",
            "order of the programs",
            PCR,
            expected=", ".join(wanted),
            found=", ".join(found),
            meaning="The release's programs were started, but not by each other in the release's order.",
            hint=_HINT,
        )
    ]


def _rest(events: Sequence[Event]) -> list[Check]:
    """What the log calls something else than a program. It may be one nevertheless, unless what was measured shows
    that it is not."""
    early = firmwares(events)
    checks = []
    for place, event in enumerate(events):
        if event.type == EventType.EFI_BOOT_SERVICES_APPLICATION or harmless(event):
            continue
        words = f"event of type {event.type:#x}: {text(event)}"
        if place < early and is_words(event):
            checks.append(information("firmware-event-4", "firmware", PCR, words))
            continue
        checks.append(
            differs(
                "foreign-event-4",
                "something measured that is no known program",
                PCR,
                expected="nothing but the programs, and what firmware is known to say of itself",
                found=f"{words} {event.digest.hex()}",
                meaning="A program that is not the release's wrote into PCR 4, as other boot loaders do, or one was "
                "started and the event log calls it something else.",
                hint=_HINT,
            )
        )
    return checks


def late_drivers(events: Sequence[Event]) -> list[Check]:
    """Drivers in PCR 2 that were started when the firmware was done: by a boot loader, from the boot partition."""
    return [
        differs(
            "late-driver",
            "EFI driver from outside the firmware",
            DRIVERS,
            expected="no driver after the firmware's own",
            found=f"{_called(event)}{text(event)} {event.digest.hex()}",
            meaning="A driver was loaded after the firmware had finished, as boot loaders do with those that lie on "
            "the boot partition; the release has none there.",
            hint="look into EFI/systemd/drivers on the boot partition, and at the firmware's driver entries",
        )
        for event in events[firmwares(events) :]
        if not harmless(event)
    ]


def _called(event: Event) -> str:
    return "" if event.type in _DRIVERS else f"the log calls it an event of type {event.type:#x}: "
