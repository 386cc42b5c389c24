"""The event logs: those of a real virtual machine, of a firmware in miniature, and broken ones."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from pathlib import Path

import pytest

from ai_assistant.tee import eventlog
from ai_assistant.tee.errors import CannotVerify, InvalidEventLog, InvalidPCRs, NoTPM
from ai_assistant.tee.eventdata import image_path, signatures, text, variable
from ai_assistant.tee.eventlog import parse, parse_pcrs, parse_userspace, replay
from tests.tee import boots
from tests.tee.boots import Boot, Tpm, header, measure

DATA = Path(__file__).parent / "data"
REAL = sorted(path.name.removeprefix("eventlog-").removesuffix(".bin") for path in DATA.glob("eventlog-*.bin"))


@pytest.mark.parametrize("name", REAL)
def test_a_real_log_leads_to_the_values_of_its_tpm(name: str) -> None:
    log = parse((DATA / f"eventlog-{name}.bin").read_bytes())
    said = parse_userspace((DATA / f"tpm2-measure-{name}.log").read_bytes())
    pcrs = parse_pcrs((DATA / f"pcrs-{name}.json").read_bytes())
    values = replay(log, said)
    # PCR 10 is the kernel's IMA, which has a log of its own.
    assert [pcr for pcr in range(16) if values[pcr] != pcrs[pcr]] == [10]


def test_a_real_log_says_what_was_started() -> None:
    log = parse((DATA / "eventlog-plain.bin").read_bytes())
    loader, uki, kernel = (text(event) for event in log.of(4) if event.type == 0x80000003)
    assert loader == "partition 1a6e4ed3-da1f-4c59-a8b7-771fe51a208a/\\EFI\\BOOT\\BOOTX64.EFI"
    assert "/\\EFI\\Linux\\ai-assistant-test-6.12.117" in uki
    assert kernel == "loaded from memory"
    found = {data.name: (data.content, event.genuine) for event in log.of(7) if (data := variable(event.data))}
    # This firmware knows nothing of Secure Boot.
    assert found == dict.fromkeys(("SecureBoot", "PK", "KEK", "db", "dbx"), (b"", True))
    assert [text(event) for event in log.of(5) if event.type == 6] == ["loader.conf: loader.conf"]
    assert [text(event) for event in log.of(11)][::2] == [".linux", ".osrel", ".cmdline", ".initrd", ".uname", ".sbat"]


@pytest.mark.parametrize("locality", [0, 3, 4])
def test_pcr_0_begins_with_the_locality_of_the_start(locality: int) -> None:
    found = measure(Boot(locality=locality))
    values = replay(parse(found.log), parse_userspace(found.system_log))
    assert values == {pcr: found.pcrs[pcr] for pcr in range(16)}


def test_other_banks_and_their_order_do_not_matter() -> None:
    tpm = Tpm(banks={0x0D: 64, 0x12: 32, 0x0B: 32, 0x0C: 48, 0x7777: 17})
    tpm.measure(4, 4, bytes(4))
    assert replay(parse(tpm.log))[4] == tpm.pcrs[4]


def test_events_without_an_action_are_not_extended() -> None:
    tpm = Tpm()
    tpm.measure(4, 4, bytes(4))
    tpm.log += tpm.record(4, boots.NO_ACTION, bytes(32), b"vendor's own")
    tpm.log += tpm.record(0xFFFFFFFF, boots.NO_ACTION, bytes(32), b"vendor's own")
    assert replay(parse(tpm.log))[4] == tpm.pcrs[4]
    assert len(parse(tpm.log).events) == 1


@pytest.mark.parametrize("rest", [bytes(4096), b"\xff" * 4096, bytes(3)])
def test_the_unused_end_of_the_table_is_none(rest: bytes) -> None:
    tpm = Tpm()
    tpm.measure(4, 4, bytes(4))
    assert len(parse(tpm.log + rest).events) == 1


def event(pcr: int, kind: int, digests: list[tuple[int, bytes]], size: int, data: bytes) -> bytes:
    head = struct.pack("<III", pcr, kind, len(digests))
    return head + b"".join(struct.pack("<H", bank) + value for bank, value in digests) + struct.pack("<I", size) + data


GOOD = [(0x04, bytes(20)), (0x0B, bytes(32))]
START = header({0x04: 20, 0x0B: 32})


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        (b"", InvalidEventLog, "too early"),
        (b"\0" * 31, InvalidEventLog, "too early"),
        (b"#!/bin/sh\n" * 20, InvalidEventLog, "too early"),
        (bytes(64), InvalidEventLog, "no crypto-agile"),
        (START[:40], InvalidEventLog, "too early"),
        (START.replace(b"Event03", b"Event02"), InvalidEventLog, "no crypto-agile"),
        (header({0x04: 20}), NoTPM, "no SHA-256"),
        (header({}), InvalidEventLog, "announces 0"),
        (header(dict.fromkeys(range(100, 117), 20)), InvalidEventLog, "announces 17"),
        (header({0x0B: 20}), InvalidEventLog, "20 bytes for algorithm 0x000b"),
        (header({0x0B: 32, 0x99: 65}), InvalidEventLog, "65 bytes"),
        (header({0x0B: 32, 0x99: 0}), InvalidEventLog, "0 bytes"),
        (START + b"\1\0\0", InvalidEventLog, "too early"),
        (START + event(24, 4, GOOD, 4, bytes(4)), InvalidEventLog, "PCR 24"),
        (START + event(0xFFFFFFFF, 4, GOOD, 4, bytes(4)), InvalidEventLog, "PCR 4294967295"),
        (START + event(4, 4, GOOD, 0xFFFFFFFF, bytes(4)), InvalidEventLog, "too early"),
        (START + event(4, 4, GOOD, 5, bytes(4)), InvalidEventLog, "1 bytes too early"),
        (START + event(4, 4, [*GOOD, (0x0C, bytes(48))], 0, b""), InvalidEventLog, "3 digests"),
        (START + event(4, 4, [GOOD[1], GOOD[1]], 0, b""), InvalidEventLog, "second digest"),
        (START + event(4, 4, [(0x0C, bytes(48))], 0, b""), InvalidEventLog, "unannounced"),
        (START + event(4, 4, [GOOD[0]], 0, b""), InvalidEventLog, "no SHA-256 digest"),
        (START + event(4, 4, [], 0, b""), InvalidEventLog, "no SHA-256 digest"),
        (START + struct.pack("<III", 4, 4, 0xFFFFFFFF), InvalidEventLog, "4294967295 digests"),
        (START + event(0, 3, GOOD, 17, b"StartupLocality\0\7"), InvalidEventLog, "locality"),
        (START + event(0, 3, GOOD, 16, b"StartupLocality\0"), InvalidEventLog, "locality"),
        (START + event(0, 3, GOOD, 17, b"StartupLocality\0\3") * 2, InvalidEventLog, "too late"),
        (
            START + event(0, 4, GOOD, 4, bytes(4)) + event(0, 3, GOOD, 17, b"StartupLocality\0\3"),
            InvalidEventLog,
            "too late",
        ),
        (bytes(eventlog.MAX_LOG_BYTES + 1), InvalidEventLog, "16 MiB"),
    ],
)
def test_what_is_no_log_is_named(raw: bytes, error: type[CannotVerify], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        parse(raw)
    assert type(caught.value) is error
    assert caught.value.hint


def test_a_million_events_are_refused_without_keeping_them() -> None:
    raw = START + event(4, 4, GOOD, 0, b"") * ((eventlog.MAX_LOG_BYTES - len(START)) // 74)
    tracemalloc.start()
    with pytest.raises(InvalidEventLog, match="more than 20000 events"):
        parse(raw)
    assert tracemalloc.get_traced_memory()[1] < 3 * eventlog.MAX_LOG_BYTES
    tracemalloc.stop()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_changed_in_a_log_it_reads_or_is_refused_by_name(seed: int) -> None:
    """Cuts, flips, and sizes of every kind, and everything that is read is also put into words."""
    rng = random.Random(seed)
    real = (DATA / "eventlog-plain.bin").read_bytes()
    made = measure(Boot(locality=3)).log
    refused = 0
    for _ in range(400):
        raw = bytearray(rng.choice((real, made)))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(raw))
            match rng.randrange(4):
                case 0:
                    raw[at] ^= 1 << rng.randrange(8)
                case 1:
                    del raw[at:]
                    raw += b"\0"
                case 2:
                    raw[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, len(raw))))
                case _:
                    raw[at:at] = rng.randbytes(rng.randrange(1, 40))
        try:
            log = parse(bytes(raw))
        except CannotVerify:
            refused += 1
            continue
        replay(log)
        for each in log.events:
            assert text(each).isprintable()
            image_path(each.data)
            signatures(each.data)
    assert 0 < refused < 400


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_changed_in_the_data_of_an_event_it_has_words(seed: int) -> None:
    rng = random.Random(seed)
    samples = [boots.image_event("\\EFI\\x.efi"), boots.variable_data("db", boots.signature_list("a", "b"))]
    for _ in range(1000):
        data = bytearray(rng.choice(samples))
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(data))
            data[at : at + 1] = rng.choice((b"", b"\xff", rng.randbytes(2), b"\0\0\0\0"))
        for kind in (boots.CONFIG, boots.APPLICATION, boots.TAG, boots.IPL, 0):
            assert text(eventlog.Event(1, 7, kind, bytes(32), bytes(data))).isprintable()
        found = variable(bytes(data))
        for entry in signatures(found.content if found else bytes(data)):
            assert len(entry) < 1000


def test_a_path_that_is_longer_than_its_event_is_none() -> None:
    whole = boots.image_event("\\EFI\\x.efi")
    assert image_path(whole) == f"partition {boots.PARTITION}/\\EFI\\x.efi"
    assert image_path(whole[:-1]) is None
    assert image_path(whole[:31]) is None
    assert image_path(boots.image_event(None)) == ""


def test_a_huge_signature_list_is_not_put_into_words_entirely() -> None:
    each = boots.OWNER.bytes_le + bytes(32)
    many = bytes.fromhex("2616c4c14c509240aca941f936934328") + struct.pack("<III", 28 + 48 * 9000, 0, 48) + each * 9000
    assert len(signatures(many)) == 100


def test_systemds_log_is_read_and_a_record_cut_off_is_left_out() -> None:
    whole = boots.system_record(11, b"enter-initrd") + boots.system_record(15, b"machine-id:1", "machine-id")
    found = parse_userspace(whole)
    assert [(each.pcr, each.text, each.kind) for each in found] == [
        (11, "enter-initrd", "phase"),
        (15, "machine-id:1", "machine-id"),
    ]
    assert found[0].digest == boots.sha256(b"enter-initrd")
    assert parse_userspace(whole + boots.system_record(11, b"leave-initrd")[:-30]) == found
    assert parse_userspace(b"") == ()


def test_records_about_nv_indexes_are_not_about_pcrs() -> None:
    assert parse_userspace(b'\x1e{"nv_index": 30474752, "digests": []}\n') == ()


@pytest.mark.parametrize(
    "record",
    [
        b"nonsense",
        b"\x1enonsense\n",
        b"\x1e" + b"[" * 100_000 + b"\n",
        b'\x1e{"pcr": 11}\n',
        b'\x1e{"pcr": 24, "digests": [{"hashAlg": "sha256", "digest": "%s"}]}\n' % (b"00" * 32),
        b'\x1e{"pcr": true, "digests": [{"hashAlg": "sha256", "digest": "%s"}]}\n' % (b"00" * 32),
        b'\x1e{"pcr": "11", "digests": [{"hashAlg": "sha256", "digest": "%s"}]}\n' % (b"00" * 32),
        b'\x1e{"pcr": 11, "digests": [{"hashAlg": "sha256", "digest": "%s"}]}\n' % (b"00" * 31),
        b'\x1e{"pcr": 11, "digests": [{"hashAlg": "sha256", "digest": null}]}\n',
        b'\x1e{"pcr": 11, "digests": [{"hashAlg": "sha1", "digest": "%s"}]}\n' % (b"00" * 20),
        b'\x1e{"pcr": 11, "digests": 7}\n',
        b'\x1e{"pcr": 11, "digests": [{"hashAlg": "sha256", "digest": 7}, 7]}\n',
        b"\x1e{}\n" * 20_001,
        bytes(eventlog.MAX_LOG_BYTES + 1),
    ],
)
def test_a_hostile_system_log_is_refused_by_name(record: bytes) -> None:
    with pytest.raises(InvalidEventLog) as caught:
        parse_userspace(record)
    assert "tpm2-measure.log" in caught.value.hint


def test_odd_contents_of_a_record_are_no_words() -> None:
    record = json.loads(boots.system_record(11, b"ready")[1:])
    record["content"] = ["ready"]
    assert parse_userspace(b"\x1e" + json.dumps(record).encode() + b"\n")[0].text == ""
    record["content"] = {"string": 7, "eventType": None}
    assert parse_userspace(b"\x1e" + json.dumps(record).encode() + b"\n")[0].text == ""


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"7", b'{"x": "00"}', b'{"0": "00"}', b"{}", b'{"0": 7}', b"[" * 100_000,
     json.dumps({str(pcr): "00" * 32 for pcr in range(15)}).encode(),
     json.dumps({str(pcr): "00" * 31 for pcr in range(24)}).encode()],
)  # fmt: skip
def test_pcr_values_that_are_none_are_refused_by_name(raw: bytes) -> None:
    with pytest.raises(InvalidPCRs):
        parse_pcrs(raw)
