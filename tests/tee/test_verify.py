"""A good boot is as published; each tampered one differs in the component that was tampered with, and in no other."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.tee import measurements
from ai_assistant.tee.eventlog import Event, EventLog, parse, parse_pcrs, parse_userspace
from ai_assistant.tee.measurements import Measurements
from ai_assistant.tee.report import Check, Report, Verdict
from ai_assistant.tee.running import Root, Running
from ai_assistant.tee.verify import verify
from tests.tee import boots
from tests.tee.boots import (
    COMMAND_LINE,
    DATABASE,
    IMAGE,
    LOADER,
    PHASES,
    ROOT_HASH,
    SECTIONS,
    SHELL,
    UKI,
    Boot,
    Program,
    sha256,
)

DATA = Path(__file__).parent / "data"
TABLE = (
    f"0 1024 verity 1 254:1 254:2 4096 4096 128 1 sha256 {ROOT_HASH} 00ff 2 panic_on_corruption use_fec_from_device\n"
)
RUNNING = Running(COMMAND_LINE, Root("/dev/mapper/root", TABLE), UKI)


def expected(**changes: Any) -> Measurements:
    return measurements.parse(boots.published(**changes))


def judge(boot: Boot | None = None, *, system: Running | None = None, log: bool = True, **changes: Any) -> Report:
    """The verdict about a boot; ``log`` is whether systemd's log is there."""
    found = boots.measure(boot or Boot())
    said = parse_userspace(found.system_log) if log else None
    report = verify(parse(found.log), said, found.pcrs, expected(**changes), system)
    for check in report.checks:
        assert check.found, check
        # Every difference is explained in full, and nothing else is.
        told = [check.expected, check.meaning, check.hint]
        assert all(told) if check.verdict is Verdict.DIFFERS else not any(told)
    return report


def wrong(report: Report) -> dict[str, Check]:
    return {check.id: check for check in report.differences}


def test_a_good_boot_is_as_published() -> None:
    report = judge(system=RUNNING)
    assert report.verdict is Verdict.AS_PUBLISHED
    assert report.differences == ()
    assert report.phases == PHASES
    same = {check.id for check in report.checks if check.verdict is Verdict.AS_PUBLISHED}
    assert same == {
        "secure-boot", "pk", "kek", "db", "authority", "boot-loader", "unified-kernel-image", "uki-contents",
        "additions", "command-line", "root",
    }  # fmt: skip
    told = {check.id: check.found for check in report.checks if check.verdict is Verdict.INFORMATION}
    assert told["phases"] == "enter-initrd → leave-initrd → sysinit → ready"
    assert told["pcr-15"] == "machine-id:0123456789abcdef0123456789abcdef"
    assert told["variable-dbx"] == "empty"
    assert "leads to the TPM's values" in told["event-log"]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_as_published_at_each_phase(count: int) -> None:
    report = judge(Boot(phases=PHASES[:count]))
    assert report.differences == ()
    assert report.phases == PHASES[:count]


def test_shutting_down_is_a_phase_too() -> None:
    assert judge(Boot(phases=(*PHASES, "shutdown"))).phases[-1] == "shutdown"


def test_without_systemds_log_pcr_11_is_found_by_its_value() -> None:
    report = judge(log=False)
    assert report.differences == ()
    assert report.phases == PHASES
    assert "missing" in next(check for check in report.checks if check.id == "system-log").found


def test_the_kernels_lost_exit_events_are_no_difference() -> None:
    assert judge(Boot(exits_logged=False)).differences == ()


def test_the_firmware_may_start_programs_of_its_own_and_write_what_it_does() -> None:
    own = Program(None, sha256(b"diagnostics"), firmware=True)
    report = judge(Boot(firmware_programs=(own,), actions=(b"DMA Protection Disabled",)))
    assert report.differences == ()
    told = [check.found for check in report.checks if check.component == "firmware" and check.pcr in (4, 7)]
    assert any("a program of its own" in each for each in told)
    assert "DMA Protection Disabled" in told


OTHER_UKI = replace(IMAGE, digest=sha256(b"another uki"))
OTHER_LOADER = replace(LOADER, digest=sha256(b"another loader"))
# The published programs, but signed by another key.
OTHERS_LOADER, OTHERS_IMAGE = (replace(each, signer="Someone else") for each in (LOADER, IMAGE))
EXTRA = "init=/bin/sh"
TAMPERED: dict[str, tuple[Boot, dict[str, str]]] = {
    # Each with the checks that differ, and what their found, meaning or hint must say.
    "another boot loader": (
        Boot(programs=(OTHER_LOADER, IMAGE)),
        {"boot-loader": OTHER_LOADER.digest.hex()},
    ),
    "another UKI, same sections": (
        Boot(programs=(LOADER, OTHER_UKI)),
        {"unified-kernel-image": OTHER_UKI.digest.hex()},
    ),
    "another kernel": (
        Boot(programs=(LOADER, OTHER_UKI), sections=SECTIONS | {".linux": b"evil"}),
        {"unified-kernel-image": "another kernel", "section.linux": "the kernel"},
    ),
    "another kernel, Secure Boot off": (
        Boot(secure_boot=False, kernel=replace(boots.KERNEL, digest=sha256(b"evil"))),
        {"kernel-inside-it": "loaded from memory", "secure-boot": "Secure Boot is off"},
    ),
    "another command line in the UKI": (
        Boot(programs=(LOADER, OTHER_UKI), sections=SECTIONS | {".cmdline": b"single\0"}),
        {"unified-kernel-image": "", "section.cmdline": "command line"},
    ),
    "another initial file system": (
        Boot(programs=(LOADER, OTHER_UKI), sections=SECTIONS | {".initrd": b"evil"}),
        {"unified-kernel-image": "", "section.initrd": "opens the root file system"},
    ),
    "a section more": (
        Boot(programs=(LOADER, OTHER_UKI), sections=SECTIONS | {".dtb": b"tree"}),
        {"unified-kernel-image": "", "section-unknown": sha256(b"tree").hex()},
    ),
    "a section less": (
        Boot(programs=(LOADER, OTHER_UKI), sections={n: c for n, c in SECTIONS.items() if n != ".pcrpkey"}),
        {"unified-kernel-image": "", "section.pcrpkey": "not there"},
    ),
    "sections in another order": (
        Boot(sections=dict(reversed(SECTIONS.items()))),
        {"section-order": ".pcrpkey, .sbat"},
    ),
    "no unified kernel image": (
        Boot(sections={}, programs=(LOADER,)),
        {"unified-kernel-image": "it was not started", "uki-contents": "measured none"},
    ),
    "a shell before the loader": (
        Boot(programs=(SHELL, LOADER, IMAGE)),
        {"foreign-program": "shell.efi", "authority": "CN=Someone else"},
    ),
    "a shell before the loader, by the release's key": (
        Boot(programs=(replace(SHELL, signer="release"), LOADER, IMAGE)),
        {"foreign-program": "shell.efi"},
    ),
    "a shell that the firmware started before its boot loader": (
        Boot(firmware_programs=(SHELL,)),
        {"foreign-program": "shell.efi"},
    ),
    "another UKI of another name": (
        Boot(programs=(LOADER, replace(OTHER_UKI, file="\\EFI\\Linux\\other.efi"))),
        {"unified-kernel-image": "other.efi"},
    ),
    "a shell in place of the kernel, Secure Boot off": (
        Boot(secure_boot=False, kernel=replace(SHELL, file="\\shell.efi")),
        {"secure-boot": "", "kernel-inside-it": "it was not started", "foreign-program": "shell.efi"},
    ),
    "the image without the loader": (
        Boot(programs=(IMAGE,)),
        {"boot-loader": "it was not started"},
    ),
    "loader and image in the wrong order": (
        Boot(programs=(IMAGE, LOADER)),
        {"program-order": "unified kernel image, boot loader"},
    ),
    "a driver from the boot partition": (
        Boot(late_drivers=(Program("\\EFI\\systemd\\drivers\\evilx64.efi", sha256(b"driver")),)),
        {"late-driver": "evilx64.efi"},
    ),
    "Secure Boot off": (
        Boot(secure_boot=False),
        {"secure-boot": "switch Secure Boot on"},
    ),
    "setup mode": (
        Boot(secure_boot=False, setup_mode=True),
        {"secure-boot": "setup mode", "pk": "empty", "kek": "empty", "db": "empty"},
    ),
    "other keys": (
        Boot(keys=("Someone else",), programs=(OTHERS_LOADER, OTHERS_IMAGE)),
        {"pk": "CN=Someone else", "kek": "CN=Someone else", "db": "CN=Someone else", "authority": "CN=Someone else"},
    ),
    "one key more": (
        Boot(keys=("release", "Someone else")),
        {"pk": "2 entries", "kek": "2 entries", "db": "CN=Someone else"},
    ),
    "the firmware's debugger": (
        Boot(actions=(b"UEFI Debug Mode",)),
        {"firmware-debug": "debugger"},
    ),
    "a firmware that failed while it measured": (
        Boot(separator=b"\1\0\0\0"),
        {"separator-7": "a separator that reports an error"},
    ),
    "the firmware's own shell, started as a boot option": (
        Boot(programs=(Program(None, sha256(b"built-in shell"), firmware=True), LOADER, IMAGE)),
        {"foreign-program": "firmware "},
    ),
    "words added in the boot menu": (
        Boot(command_line_added=(f"{COMMAND_LINE} {EXTRA}",)),
        {"additions": EXTRA},
    ),
    "credentials": (
        Boot(added=((12, "Credentials initrd"),)),
        {"additions": "credentials from the boot partition"},
    ),
    "global credentials": (
        Boot(added=((12, "Global credentials initrd"),)),
        {"additions": "credentials from the boot partition (Global credentials initrd)"},
    ),
    "a command line that the log invents": (
        Boot(added=((12, "quiet"),)),
        {"additions": "by the log's word: quiet"},
    ),
    "a system extension": (
        Boot(added=((13, "System extension initrd"),)),
        {"extensions": "System extension initrd"},
    ),
    "a phase missing": (
        Boot(phases=("enter-initrd", "sysinit", "ready")),
        {"phases": "missing: leave-initrd"},
    ),
    "a phase twice": (
        Boot(phases=("enter-initrd", "leave-initrd", "leave-initrd", "sysinit", "ready")),
        {"phases": "twice: leave-initrd"},
    ),
    "phases in another order": (
        Boot(phases=("leave-initrd", "enter-initrd")),
        {"phases": "in another order"},
    ),
    "a phase of somebody else": (
        Boot(phases=(*PHASES[:2], "own\nphase")),
        {"phases": "not ours: something else (own�phase)"},
    ),
    "no phases": (Boot(phases=()), {"phases": "none"}),
    "the initial file system never left": (Boot(phases=PHASES[:1]), {"phases": "has been left"}),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_boot_is_named_by_its_component(case: str) -> None:
    boot, differing = TAMPERED[case]
    report = judge(boot)
    found = wrong(report)
    assert set(found) == set(differing)
    assert report.verdict is Verdict.DIFFERS
    for name, words in differing.items():
        assert words in "\n".join((found[name].found, found[name].meaning, found[name].hint))


def altered(pcr: int, boot: Boot | None = None, *, drop: bool = False) -> Report:
    """A boot after which something was extended that no log has, or whose log lacks an event."""
    found = boots.measure(boot or Boot())
    pcrs = found.pcrs | {pcr: sha256(found.pcrs[pcr], bytes(32))}
    log = parse(found.log)
    if drop:
        pcrs = found.pcrs
        last = log.of(pcr)[-1]
        log = replace(log, events=tuple(event for event in log.events if event is not last))
    return verify(log, parse_userspace(found.system_log), pcrs, expected())


@pytest.mark.parametrize(
    ("pcr", "differing"),
    [
        *((pcr, {f"event-log-{pcr}"}) for pcr in range(8)),
        (11, {"event-log-11", "uki-contents"}),
        (12, {"event-log-12", "additions"}),
        (13, {"extensions"}),
        *((pcr, set()) for pcr in (8, 9, 10, 14, 15)),
    ],
)
def test_something_that_no_log_has(pcr: int, differing: set[str]) -> None:
    assert set(wrong(altered(pcr))) == differing


def test_what_the_running_system_adds_to_the_firmwares_pcrs_is_not_the_firmwares() -> None:
    """Logged or not, nothing but the firmware has a say in what was started."""
    found = boots.measure(Boot())
    pcrs = found.pcrs | {4: sha256(found.pcrs[4], sha256(b"own words"))}
    said = parse_userspace(found.system_log + boots.system_record(4, b"own words"))
    report = verify(parse(found.log), said, pcrs, expected())
    assert set(wrong(report)) == {"event-log-4"}
    assert "says that it added: own words" in wrong(report)["event-log-4"].found


def test_an_event_that_the_log_lost() -> None:
    assert set(wrong(altered(4, drop=True))) == {"event-log-4", "unified-kernel-image"}


def test_a_log_that_tells_of_other_keys_than_were_measured() -> None:
    """The text beside a digest is only the log's word."""
    found = boots.measure(Boot(keys=("Someone else",), programs=(LOADER, IMAGE)))
    other = boots.certificate("Someone else")
    lie = found.log.replace(other, bytes(len(other)))
    report = verify(parse(lie), parse_userspace(found.system_log), found.pcrs, expected())
    assert "is not what was measured" in wrong(report)["pk"].found
    assert set(wrong(report)) == {"pk", "kek", "db"}


def test_a_log_of_another_boot() -> None:
    here, there = boots.measure(Boot()), boots.measure(Boot(programs=(SHELL, LOADER, IMAGE)))
    report = verify(parse(here.log), parse_userspace(here.system_log), there.pcrs, expected())
    assert {"event-log-4", "event-log-7"} <= set(wrong(report))


def test_values_that_were_extended_from_the_running_system() -> None:
    """Repeating the published events after a boot with Secure Boot off leads nowhere near."""
    found = boots.measure(Boot(secure_boot=False))
    tpm = boots.Tpm()
    tpm.pcrs, tpm.log = dict(found.pcrs), found.log
    for event in parse(boots.measure(Boot()).log).of(7):
        tpm.measure(7, event.type, event.data, event.digest)
    report = verify(parse(tpm.log), parse_userspace(found.system_log), tpm.pcrs, expected())
    assert {"secure-boot", "separator-7"} <= set(wrong(report))


@pytest.mark.parametrize(
    ("pcr", "kind", "data", "differing"),
    [
        (4, boots.IPL, b"grub", "foreign-event-4"),
        (7, boots.SEPARATOR, b"\1\0\0\0", "separator-7"),
        (7, boots.CONFIG, b"nonsense", "foreign-event-7"),
        (7, boots.CONFIG, boots.variable_data("dbx", b""), "foreign-event-7"),
        (7, boots.CONFIG, boots.variable_data("SecureBoot", b"\1"), "secure-boot"),
        (7, boots.AUTHORITY, b"nonsense", "authority"),
        (7, boots.ACTION, b"Firmware Configuration", "foreign-event-7"),
        (7, boots.ACTION, b"DMA Protection Disabled", None),
        (7, boots.IPL, b"grub", "foreign-event-7"),
        (4, boots.ACTION, b"Returning from EFI Application from Boot Option", None),
        (4, boots.ACTION, b"Calling EFI Application from Boot Option\0", None),
        (4, boots.ACTION, b"Starting something", "foreign-event-4"),
        (4, 0x12, b"BOOT ATTEMPTS OMITTED", None),
        (4, 0x12, b"nothing", "foreign-event-4"),
        (4, boots.SEPARATOR, bytes(4), None),
        (4, boots.SEPARATOR, b"evil", "foreign-event-4"),
        (2, boots.SEPARATOR, bytes(4), None),
        (2, boots.ACTION, b"anything", "late-driver"),
        (2, boots.TAG, b"anything", "late-driver"),
        (1, 0x7FFFFFFF, b"anything", None),
    ],
)
def test_other_events_after_the_firmware(pcr: int, kind: int, data: bytes, differing: str | None) -> None:
    tpm = Boot().run()
    tpm.measure(pcr, kind, data)
    for phase in PHASES:
        tpm.extend(11, sha256(phase.encode()))
    report = verify(parse(tpm.log), None, tpm.pcrs, expected())
    assert set(wrong(report)) == ({differing} if differing else set())


# A firmware of its own for forgeries: what the TPM holds, and what a log makes of it.
EVIL = Program("\\evil.efi", sha256(b"evil"))
CALLING = b"Calling EFI Application from Boot Option"


def off_and_repeated() -> list[Event]:
    """What the TPM got, in order, when a hostile program was started with Secure Boot off and then extended all that
    is published. Nobody can take any of these digests back."""
    good = parse(boots.measure(Boot()).log)
    off = parse(boots.measure(Boot(secure_boot=False, programs=(EVIL,), sections={}, phases=())).log)
    loaded = [event for event in off.of(4) if event.digest != boots.KERNEL.digest]
    got = [event for event in off.events if event.pcr not in (4, 7)] + list(off.of(7)) + loaded
    got += [event for event in good.of(7) if event.type in (boots.CONFIG, boots.AUTHORITY)]
    got += [event for event in good.of(4) if event.type == boots.APPLICATION]
    got += good.of(11)
    return [replace(event, number=number) for number, event in enumerate(got, 1)]


def forged(told: list[Event], got: list[Event]) -> Report:
    """The verdict about a log that tells these events, in which the digests are those that the TPM got."""
    assert [(event.pcr, event.digest) for event in told] == [(event.pcr, event.digest) for event in got]
    pcrs = dict.fromkeys(range(24), bytes(32))
    for event in got:
        pcrs[event.pcr] = sha256(pcrs[event.pcr], event.digest)
    said = parse_userspace(b"".join(boots.system_record(11, phase.encode()) for phase in PHASES))
    for each in said:
        pcrs[11] = sha256(pcrs[11], each.digest)
    report = verify(EventLog(tuple(told)), said, pcrs, expected())
    assert "leads to the TPM's values" in next(check.found for check in report.checks if check.id == "event-log")
    assert not {f"event-log-{pcr}" for pcr in (2, 4, 7, 11)} & set(wrong(report))
    return report


SEPARATOR = sha256(bytes(4))
LIES: dict[str, tuple[int | None, bytes | None]] = {
    # What the log calls the events that give it away, and the data that it tells of them.
    "no lie": (None, None),
    "an action, other words": (boots.ACTION, b"Firmware Configuration"),
    "an action, known words": (boots.ACTION, CALLING),
    "an action, known words of PCR 7": (boots.ACTION, b"DMA Protection Disabled"),
    "an action, true data": (boots.ACTION, None),
    "a separator": (boots.SEPARATOR, bytes(4)),
    "boot devices left out": (0x12, b"BOOT ATTEMPTS OMITTED"),
    "a tag": (boots.TAG, b""),
    "a variable, true data": (boots.CONFIG, None),
    "a variable of another name": (boots.CONFIG, boots.variable_data("dbt", b"", DATABASE)),
    "a boot variable": (boots.BOOT, None),
    "a signer": (boots.AUTHORITY, None),
    "a signer, other data": (boots.AUTHORITY, boots.admission("release")),
    "a driver": (boots.DRIVER, boots.image_event(None)),
    "a program of the firmware": (boots.APPLICATION, boots.image_event(None, firmware=True)),
    "a type that nobody knows": (0x7FFFFFFF, b""),
}


@pytest.mark.parametrize("separator", ["told", "hidden"])
@pytest.mark.parametrize("lie", LIES)
def test_no_other_name_hides_secure_boot_off_or_a_program(lie: str, separator: str) -> None:
    kind, data = LIES[lie]
    got = off_and_repeated()
    published = {event.digest for event in parse(boots.measure(Boot()).log).events}

    def tell(event: Event) -> Event:
        gives_away = event.pcr in (4, 7) and event.digest not in published
        if not gives_away and not (separator == "hidden" and event.pcr in (4, 7) and event.digest == SEPARATOR):
            return event
        return replace(event, type=event.type if kind is None else kind, data=event.data if data is None else data)

    report = forged([tell(event) for event in got], got)
    found = wrong(report)
    assert {each.pcr for each in found.values()} >= {4, 7}
    assert "Nothing shows that Secure Boot was on" in found["secure-boot"].meaning
    assert EVIL.digest.hex() in "".join(check.found for check in report.differences if check.pcr == 4)
    # The rest of the forgery holds: only what was relabelled gives it away.
    assert "uki-contents" not in found


def test_the_firmwares_separator_cannot_be_moved_behind_a_program() -> None:
    """Called a program of the firmware, with a second one after the hostile program."""
    got = off_and_repeated()
    evil = next(place for place, event in enumerate(got) if event.digest == EVIL.digest)
    got.insert(evil + 1, Event(1000, 4, boots.SEPARATOR, SEPARATOR, bytes(4)))
    own = boots.image_event(None, firmware=True)
    told = [
        replace(event, type=boots.APPLICATION, data=own)
        if event.pcr == 4 and place <= evil and event.data != CALLING
        else event
        for place, event in enumerate(got)
    ]
    found = [check.found for check in forged(told, got).differences if check.id == "foreign-program"]
    assert any(EVIL.digest.hex() in each for each in found)
    assert any(SEPARATOR.hex() in each for each in found)


@pytest.mark.parametrize("kind", [boots.ACTION, boots.TAG, boots.SEPARATOR, boots.APPLICATION])
def test_no_other_name_hides_a_late_driver(kind: int) -> None:
    driver = Program("\\EFI\\systemd\\drivers\\evilx64.efi", sha256(b"driver"))
    measured = boots.measure(Boot(late_drivers=(driver,)))
    log = parse(measured.log)
    told = tuple(replace(e, type=kind, data=bytes(4)) if e.digest == driver.digest else e for e in log.events)
    report = verify(replace(log, events=told), parse_userspace(measured.system_log), measured.pcrs, expected())
    assert set(wrong(report)) == {"late-driver"}
    assert driver.digest.hex() in wrong(report)["late-driver"].found


def test_published_digests_beside_other_data_are_a_difference() -> None:
    """Who tells another story about a published digest has something to hide, or a broken firmware."""
    measured = boots.measure(Boot())
    log = parse(measured.log)
    for event in log.of(7):
        told = tuple(replace(e, data=b"x") if e is event else e for e in log.events)
        report = verify(replace(log, events=told), parse_userspace(measured.system_log), measured.pcrs, expected())
        # Without Secure Boot, the kernel should have been among the programs.
        proven = event.data != boots.variable_data("SecureBoot", b"\1")
        assert {check.pcr for check in report.differences} == ({7} if proven else {4, 7}), event


def test_a_firmware_without_separators_is_a_difference() -> None:
    log = parse(boots.measure(Boot()).log)
    got = [event for event in log.events if event.type != boots.SEPARATOR and event.pcr in (2, 4, 7, 11)]
    assert {"separator-7", "secure-boot", "late-driver"} <= set(wrong(forged(got, got)))


@pytest.mark.parametrize(
    ("changes", "differing", "words"),
    [
        ({"command_line": f"{COMMAND_LINE} {EXTRA}"}, "command-line", f"added: {EXTRA}"),
        ({"command_line": f"roothash={ROOT_HASH}"}, "command-line", "missing: lockdown=integrity"),
        ({"command_line": " ".join(reversed(COMMAND_LINE.split()))}, "command-line", "another order"),
        ({"command_line": ""}, "command-line", "missing: "),
        ({"root": Root("ext4 on /dev/vda2", "")}, "root", "without dm-verity"),
        ({"root": Root("/dev/mapper/root", TABLE.replace("ab", "cd"))}, "root", "cdcd"),
        ({"root": Root("/dev/mapper/root", "0 1024 linear 254:1 0\n")}, "root", "without dm-verity"),
        ({"root": Root("/dev/mapper/root", TABLE.replace("verity", "linear"))}, "root", "without dm-verity"),
        ({"root": Root("/dev/mapper/root", TABLE * 2)}, "root", "without dm-verity"),
        ({"root": Root("/dev/mapper/root", "0 1024 verity 1")}, "root", "without dm-verity"),
    ],
)
def test_what_runs_is_compared_too(changes: dict[str, Any], differing: str, words: str) -> None:
    found = wrong(judge(system=replace(RUNNING, **changes)))
    assert set(found) == {differing}
    assert words in found[differing].found


def test_spaces_at_the_ends_of_a_command_line_are_nothing() -> None:
    assert not judge(system=replace(RUNNING, command_line=f" {COMMAND_LINE} \n")).differences


def test_another_name_of_the_same_image_is_information() -> None:
    report = judge(system=replace(RUNNING, uki="renamed.efi"))
    assert not report.differences
    assert any(check.id == "uki-name" for check in report.checks)


def test_one_of_several_published_programs_is_enough() -> None:
    pcr4 = boots.measurements()["pcr4"]
    older = [{**pcr4[0], "sha256": "00" * 32}]
    assert not judge(pcr4=older + pcr4).differences


def real(name: str, published: str) -> Report:
    """A virtual machine's boot, recorded: OVMF, swtpm, systemd; and what image/sign published."""
    log = parse((DATA / f"eventlog-{name}.bin").read_bytes())
    said = parse_userspace((DATA / f"tpm2-measure-{name}.log").read_bytes())
    pcrs = parse_pcrs((DATA / f"pcrs-{name}.json").read_bytes())
    return verify(log, said, pcrs, measurements.parse((DATA / published).read_bytes()))


def test_a_real_boot_with_secure_boot_is_what_image_sign_published() -> None:
    report = real("secure", "measurements-secure.json")
    assert report.differences == ()
    assert report.phases == PHASES
    assert "48 events, leads to the TPM's values" in {check.found for check in report.checks}


def test_a_real_boot_of_another_release_is_not_this_one() -> None:
    """Another image, signed with other keys of the same name; the boot loader is the same package's."""
    found = wrong(real("secure", "measurements-signed.json"))
    assert set(found) == {
        "pk", "kek", "db", "authority", "unified-kernel-image", "section.cmdline", "section.initrd",
        "section.pcrpkey",
    }  # fmt: skip
    assert "CN=AI Assistant OS generated TEST key" in found["db"].found
    assert "\\EFI\\Linux\\ai-assistant-test" in found["unified-kernel-image"].found


def test_a_real_boot_without_secure_boot_differs_in_that() -> None:
    """The same image before it was signed: its boot loader and kernel are the published ones, its UKI is not."""
    found = wrong(real("plain", "measurements-signed.json"))
    assert set(found) == {"secure-boot", "pk", "kek", "db", "unified-kernel-image", "section.pcrpkey"}
    assert found["secure-boot"].found == "not known to this firmware"
    assert found["section.pcrpkey"].found == "not there"


def test_digests_are_those_of_the_data() -> None:
    # The miniature must not share a mistake with what it tests.
    assert sha256(b"a", b"b") == hashlib.sha256(b"ab").digest()


def test_every_id_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "verify-boot.md").read_text()
    reports = [judge(system=RUNNING), judge(log=False), *(judge(boot) for boot, _ in TAMPERED.values())]
    reports += [altered(pcr) for pcr in range(16)]
    got = off_and_repeated()
    reports.append(forged([replace(event, type=boots.ACTION) if event.pcr in (4, 7) else event for event in got], got))
    for name in {check.id for report in reports for check in report.checks}:
        general = re.sub(r"^section\..*", "section.NAME", re.sub(r"^variable-.*", "variable-NAME", name))
        assert f"`{general}`" in page or f"`{re.sub(r'[0-9]+$', 'N', general)}`" in page
