"""What a disk is after a power cut in its first boot: to be begun again, finished, or broken.

The firmware must find a partition table, and what the image brought must be as the image had it. Then either there is
no state partition, and the next boot makes one; or there is, and it is whole: LUKS that a TPM key opens, an ext4 that
`e2fsck -p` – which the next boot runs – takes without a question. Anything else is broken.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from image.vm import gpt
from image.vm.crash import History, Medium, State, crash_states
from image.vm.disk import Disk
from image.vm.plaintext import Plaintext
from image.vm.process import VMError, tool
from image.vm.writelog import Entry, Flag, WriteLog

LUKS_MAGIC = b"LUKS\xba\xbe"
EXT4_MAGIC = b"\x53\xef"
EXT4_MAGIC_AT = 1080
# Both copies of a LUKS2 header with its key slots, as cryptsetup makes them.
LUKS_HEAD = 16 << 20
# Where a table, a superblock or a LUKS header is written.
HEAD = 64 << 10
LARGE = 64 << 20


class Kind(StrEnum):
    BEFORE = "first boot to be begun again"
    AFTER = "first boot finished"
    BROKEN = "broken"


@dataclass(frozen=True)
class Verdict:
    """A state and what it is; `problems` are why it is broken."""

    state: State
    kind: Kind
    problems: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()  # what the firmware would find broken, and repair
    repaired: bool = False  # by `e2fsck -y`, from another superblock

    def __str__(self) -> str:
        pending = "".join(
            f"\n    {each.entry}" + ("" if each.whole else f", blocks {each.first} to {each.last} of it")
            for each in self.state.kept[:40]
        )
        return f"{self.state}: {self.kind}: {'; '.join(self.problems)}{pending}"


@dataclass
class Judge:
    """Compares the states of a disk with the image that it began as."""

    image: Path
    log: WriteLog
    medium: Medium
    scratch: Path
    volume_key: bytes = b""  # of LUKS, when what is inside is to be checked as well
    _plain: Plaintext | None = None
    _esp_seen: dict[object, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def _brought(self) -> gpt.Table:
        with self.image.open("rb") as file:
            return gpt.read_table(reader(file), 1)

    def judge(self, state: State) -> Verdict:
        self.medium.become(state)
        tables = gpt.read_tables(self.medium.read, self.medium.size)
        if tables.used is None:
            return Verdict(state, Kind.BROKEN, tables.problems, tables.problems)
        problems = gpt.layout_problems(tables.used, self.medium.size)
        for each in self._brought.partitions:
            same = [other for other in tables.used.partitions if other.number == each.number]
            # The boot partition is given an id of the machine's own.
            own = each.kind != "esp"
            if not same or (same[0].start, same[0].size, same[0].type_uuid, same[0].uuid if own else "") != (
                *(each.start, each.size, each.type_uuid, each.uuid if own else ""),
            ):
                problems.append(f"partition {each.number} ({each.label}) is not where the image had it")
        problems += self._slots(state) + list(self._esp(state))
        kind, repaired = Kind.BEFORE, False
        for each in tables.used.partitions:
            if each.kind == "var":
                kind = Kind.AFTER
                fault, repaired = self._contents(each, state)
                problems += filter(None, [fault])
        return Verdict(state, Kind.BROKEN if problems else kind, tuple(problems), tables.problems, repaired)

    # ------------------------------------------------------- what the image brought
    def _touching(self, part: gpt.Partition) -> list[Entry]:
        return [each for each in self.log.entries if each.size and each.start < part.end and each.end > part.start]

    @cached_property
    def _slot_writes(self) -> list[tuple[gpt.Partition, Entry]]:
        parts = [each for each in self._brought.partitions if each.kind in ("root", "root-verity")]
        return [(part, each) for part in parts for each in self._touching(part)]

    def _slots(self, state: State) -> list[str]:
        """The root and its verity tree, byte by byte where anything was written."""
        problems = []
        for part, entry in self._slot_writes:
            if entry.number >= state.cut:
                continue
            start, end = max(entry.start, part.start), min(entry.end, part.end)
            with self.image.open("rb") as file:
                if reader(file)(start, end - start) != self.medium.read(start, end - start):
                    problems.append(f"{entry} changed partition {part.number} ({part.label})")
        return problems

    @cached_property
    def _esp_writes(self) -> list[Entry]:
        return self._touching(self._brought.find("esp"))

    def _esp(self, state: State) -> tuple[str, ...]:
        """File by file: the boot loader may keep a seed of its own there, and count boots in a file's name."""
        numbers = {each.number for each in self._esp_writes}
        durable = sum(each < state.durable for each in numbers)
        kept = tuple((each.entry.number, each.first, each.last) for each in state.kept if each.entry.number in numbers)
        if not durable and not kept:
            return ()
        if (durable, kept) not in self._esp_seen:
            part = self._brought.find("esp")
            now = self.scratch / "esp-now"
            self.medium.save(now, part.start, part.size)
            self._esp_seen[durable, kept] = tuple(
                f"{name} on the ESP is not as the image had it"
                for name, content in self._esp_files.items()
                if esp_file(f"{now}", name) != content
            )
        return self._esp_seen[durable, kept]

    @cached_property
    def _esp_files(self) -> dict[str, bytes | None]:
        source = f"{self.image}@@{self._brought.find('esp').start}"
        listing = tool("mdir", "-/", "-b", "-i", source, "::/").decode().split("\n")
        names = [each.strip() for each in listing if each.strip() and not each.strip().endswith("/")]
        return {each: esp_file(source, each) for each in names if not each.endswith("random-seed")}

    # ------------------------------------------------------------ the state partition
    def _contents(self, part: gpt.Partition, state: State) -> tuple[str, bool]:
        """What is wrong, and whether it took a repair that asks no questions."""
        head = self.medium.read(part.start, 4096)
        if head.startswith(LUKS_MAGIC):
            return self._luks(part, state)
        if head[EXT4_MAGIC_AT : EXT4_MAGIC_AT + 2] == EXT4_MAGIC:
            var = self.scratch / "var"
            self.medium.save(var, part.start, part.size)
            return check_ext4(var)
        return "the state partition is in the table, and there is neither LUKS nor ext4 in it", False

    def _luks(self, part: gpt.Partition, state: State) -> tuple[str, bool]:
        header = self.scratch / "luks"
        self.medium.save(header, part.start, min(part.size, LUKS_HEAD))
        try:
            metadata = json.loads(tool("cryptsetup", "luksDump", "--dump-json-metadata", header))
        except VMError as error:
            return f"the LUKS header is damaged: {error}", False
        kinds = [each["type"] for each in metadata["tokens"].values()]
        if "systemd-tpm2" not in kinds:
            return f"no key slot that the TPM opens, only {kinds}", False
        if not self.volume_key:
            return "", False
        segment = metadata["segments"]["0"]
        if segment["encryption"] != "aes-xts-plain64":
            raise VMError(f"cannot look into {segment['encryption']}")
        start = part.start + int(segment["offset"])
        if self._plain is None:
            self._plain = Plaintext(
                self.log, self.medium, self.volume_key, start, part.end, int(segment["sector_size"]), self.scratch
            )
        return check_ext4(self._plain.of(state))


def reader(file: BinaryIO) -> gpt.Read:
    def read(start: int, size: int) -> bytes:
        file.seek(start)
        return file.read(size)

    return read


def esp_file(source: str, name: str) -> bytes | None:
    """A file on a FAT file system; None when there is none."""
    done = subprocess.run(["mtype", "-i", source, name], capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def check_ext4(image: Path) -> tuple[str, bool]:
    """What every boot does: replay the journal and repair what is safe, and when that is not enough – a superblock of
    two blocks, of which one is old – repair from another superblock. Then nothing may be left to complain about."""

    def e2fsck(options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["e2fsck", "-f", options, image], capture_output=True, text=True, check=False)

    repaired = (done := e2fsck("-p")).returncode >= 4
    if repaired:
        e2fsck("-y")
    left = e2fsck("-n")
    if left.returncode == 0:
        return "", repaired
    return f"e2fsck -p: {done.stdout[-600:]}{done.stderr[-600:]}; after -y: {left.stdout[-600:]}", repaired


def read_volume_key(disk: Disk, part: gpt.Partition, recovery_key: str) -> bytes:
    """LUKS's volume key, by a recovery key; to look into a disk without device-mapper."""
    header, shown = disk.path.parent / "luks", disk.path.parent / "volume-key"
    header.write_bytes(disk.read(part.start, min(part.size, LUKS_HEAD)))
    shown.unlink(missing_ok=True)
    command: list[str | Path] = [
        "cryptsetup",
        "luksDump",
        "--batch-mode",
        "--dump-volume-key",
        "--volume-key-file",
        shown,
    ]
    tool(*command, "--key-file", "-", header, stdin=recovery_key.encode())
    key = shown.read_bytes()
    shown.unlink()
    return key


def important_writes(log: WriteLog, image: Path, disk_size: int, state_starts: Sequence[int]) -> Callable[[Entry], int]:
    """2 for a write to a partition table, the image's own backup included; 1 for one to the head of /var."""
    image_size = image.stat().st_size
    areas = [(start, start + HEAD, 2) for start in (0, disk_size - HEAD, image_size - HEAD)]
    for each in state_starts:  # a superblock, or LUKS and the superblock in it
        areas += [(each, each + HEAD, 1), (each + LUKS_HEAD, each + LUKS_HEAD + 4096, 1)]

    def rank(entry: Entry) -> int:
        # A discard of the whole disk touches every place and says nothing about any; nor does emptying all of it.
        if not entry.size or entry.discards or entry.size > LARGE:
            return 0
        return max((value for start, end, value in areas if entry.start < end and entry.end > start), default=0)

    return rank


def survey(judge: Judge, count: int, seed: int, *, obeys_flushes: bool = True) -> list[Verdict]:
    """Judge `count` states that a power cut during the recording could have left; or could have left of a disk that
    says that it has flushed and has not."""
    entries = [each if obeys_flushes else replace(each, flags=each.flags & ~Flag.FLUSH) for each in judge.log.entries]
    starts = state_partitions(judge.log)
    important = important_writes(judge.log, judge.image, judge.medium.size, starts)
    return [judge.judge(each) for each in crash_states(History(entries), count, seed, important)]


def state_partitions(log: WriteLog) -> list[int]:
    """Where state partitions begin, by every table entry of that type that was ever written."""
    var = next(kind for kind, name in gpt.TYPES.items() if name == "var").bytes_le
    starts = set()
    for entry in log.entries:
        if 0 < entry.size <= 4 << 20 and not entry.discards:
            data = log.data(entry)
            at = data.find(var)
            if at >= 0 and at % 128 == 0 and at + 128 <= len(data):
                starts.add(gpt.ENTRY.unpack_from(data, at)[2] * gpt.SECTOR)
    return sorted(starts)
