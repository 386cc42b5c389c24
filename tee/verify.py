"""Compare what a machine measured with what a release publishes. Pure: bytes and values in, a report out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from ai_assistant.tee import kernel_image, programs, running, secure_boot
from ai_assistant.tee.eventdata import clean, text
from ai_assistant.tee.eventlog import ZERO, EventLog, Extension, extend, replay
from ai_assistant.tee.measurements import Measurements
from ai_assistant.tee.report import Check, Report, differs, information
from ai_assistant.tee.running import Running

# The firmware's own, of which no release can know the values.
_FIRMWARE = {
    0: "firmware",
    1: "firmware settings and boot entries",
    2: "option ROMs and drivers",
    3: "settings of option ROMs",
    5: "partition table and loader.conf",
    6: "the maker's own",
}
# What the release fixes; the verdict stands on the log for these, or on the value itself.
_FIXED = (4, 7, 11, 12)
_IMA = 10
_LATER = {8: "boot loader", 9: "initial file system, as the kernel saw it", _IMA: "IMA", 14: "shim", 15: "identity"}
# The kernel takes its copy of the log just before these are measured, and some firmware does not log them after.
_EXITS = tuple(
    hashlib.sha256(words).digest()
    for words in (b"Exit Boot Services Invocation", b"Exit Boot Services Returned with Success")
)


def verify(
    log: EventLog,
    extensions: Sequence[Extension] | None,
    pcrs: Mapping[int, bytes],
    expected: Measurements,
    system: Running | None = None,
) -> Report:
    """Judge a boot.

    Args:
        log: the firmware's event log.
        extensions: the running system's log; None where there is none.
        pcrs: the TPM's values (SHA-256 bank) of PCR 0 to 15 at least.
        expected: a release's measurements, their signature checked.
        system: what runs now; None for a log from elsewhere.
    """
    replayed = replay(log, extensions or ())
    kernel = kernel_image.check(log.of(kernel_image.PCR), extensions, pcrs[kernel_image.PCR], expected)
    # PCR 11 that has a published value needs no log to vouch for it.
    without = {kernel_image.PCR} if kernel.phases and extensions is None else set()
    checks = [
        *_replay(log, extensions, replayed, pcrs, without),
        *secure_boot.check(log.of(secure_boot.PCR), expected),
        *programs.check(
            log.of(programs.PCR), expected, secure_boot=secure_boot.is_on(log.of(secure_boot.PCR), expected)
        ),
        *programs.late_drivers(log.of(programs.DRIVERS)),
        *kernel.checks,
        kernel_image.check_additions(log.of(kernel_image.ADDITIONS), pcrs[kernel_image.ADDITIONS], expected),
        kernel_image.check_extensions(log.of(kernel_image.SYSEXTS), pcrs[kernel_image.SYSEXTS]),
        *(running.check(system, expected) if system is not None else ()),
        *_values(log, extensions, pcrs),
    ]
    return Report(tuple(checks), kernel.phases)


def _replay(
    log: EventLog,
    extensions: Sequence[Extension] | None,
    replayed: Mapping[int, bytes],
    pcrs: Mapping[int, bytes],
    without: set[int],
) -> list[Check]:
    wrong = [pcr for pcr in replayed if replayed[pcr] != pcrs[pcr] and pcr not in without]
    if _IMA in wrong:  # it has a log of its own
        wrong.remove(_IMA)
    if 5 in wrong and extend(extend(replayed[5], _EXITS[0]), _EXITS[1]) == pcrs[5]:
        wrong.remove(5)
    checks = []
    words = "leads to the TPM's values" if not wrong else f"leads to the TPM's values but for PCR {_list(wrong)}"
    checks.append(information("event-log", "event log", None, f"{len(log.events)} events, {words}"))
    if extensions is None:
        checks.append(information("system-log", "log of the running system", None, "missing: it names the phases"))
    for pcr in wrong:
        if pcr < 8 or pcr in _FIXED:
            checks.append(_misled(pcr, replayed[pcr], pcrs[pcr], [e for e in extensions or () if e.pcr == pcr]))
        else:
            checks.append(information(f"log-{pcr}", f"event log of PCR {pcr}", pcr, "does not tell all of its value"))
    return checks


def _misled(pcr: int, replayed: bytes, value: bytes, said: Sequence[Extension]) -> Check:
    words = ", ".join(clean(each.text[:60]) or "?" for each in said[:4])
    later = f"; the running system says that it added: {words}" if said else ""
    return differs(
        f"event-log-{pcr}",
        f"event log of PCR {pcr}",
        pcr,
        expected=f"{value.hex()}, the TPM's value",
        found=f"the log leads to {replayed.hex()}{later}",
        meaning="The event log is not the story of this boot: events are missing or changed, something was measured "
        "after the firmware was done, or log and values were not taken from the same boot. What follows about this "
        "PCR is the log's word only.",
        hint="boot again and take both at the same time; if it stays, look for newer firmware of the board, and do not "
        "trust this machine",
    )


def _values(log: EventLog, extensions: Sequence[Extension] | None, pcrs: Mapping[int, bytes]) -> list[Check]:
    checks = [information(f"pcr-{pcr}", component, pcr, pcrs[pcr].hex()) for pcr, component in _FIRMWARE.items()]
    for pcr, component in _LATER.items():
        if pcrs[pcr] == ZERO:
            continue
        events = [
            *(text(event) for event in log.of(pcr)),
            *(clean(e.text[:80]) for e in extensions or () if e.pcr == pcr),
        ]
        said = ", ".join(dict.fromkeys(each for each in events[:6] if each))
        checks.append(information(f"pcr-{pcr}", component, pcr, said or pcrs[pcr].hex()))
    return checks


def _list(pcrs: Sequence[int]) -> str:
    return ", ".join(str(pcr) for pcr in pcrs)
