"""A machine's disk: an overlay that leaves the image alone, and faults put into it while the machine is off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from image.vm import gpt
from image.vm.process import VMError, tool

MIB = 2**20


@dataclass(frozen=True)
class Failing:
    """A disk that answers writes with an error from the `writes`-th on, and still reads."""

    writes: int


class Disk:
    """qcow2 over the image until something has to be changed from outside, raw and sparse from then on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def overlay(cls, folder: Path, image: Path, size: int, name: str = "disk") -> Disk:
        """`size` bytes that begin with the image; only what differs is stored."""
        path = folder / f"{name}.qcow2"
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", image.resolve(), "-F", "raw", path, str(size))
        return cls(path)

    @classmethod
    def empty(cls, folder: Path, size: int, name: str) -> Disk:
        path = folder / f"{name}.raw"
        with path.open("wb") as file:
            file.truncate(size)
        return cls(path)

    @property
    def format(self) -> str:
        return self.path.suffix.removeprefix(".")

    @property
    def size(self) -> int:
        self.make_raw()
        return self.path.stat().st_size

    def copy_to(self, folder: Path) -> Disk:
        target = folder / self.path.name
        tool("cp", "--sparse=always", "--reflink=auto", self.path, target)
        return Disk(target)

    def make_raw(self) -> Path:
        """As a plain sparse file, for the tools that know no qcow2."""
        if self.format != "raw":
            raw = self.path.with_suffix(".raw")
            tool("qemu-img", "convert", "-O", "raw", self.path, raw)
            self.path.unlink()
            self.path = raw
        return self.path

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        with self.make_raw().open("r+b") as file:
            yield file

    def read(self, offset: int, size: int) -> bytes:
        with self._open() as file:
            file.seek(offset)
            return file.read(size)

    def write(self, offset: int, data: bytes) -> None:
        with self._open() as file:
            file.seek(offset)
            file.write(data)

    def table(self) -> gpt.Table:
        tables = gpt.read_tables(self.read, self.size)
        if tables.used is None:
            raise VMError(f"{self.path.name}: {'; '.join(tables.problems)}")
        return tables.used

    def partition(self, name: str | int) -> gpt.Partition:
        """By number, label or kind: 6, "var", "root"."""
        return self.table().find(name)

    # ---------------------------------------------------------------- faults
    def flip_bit(self, partition: str | int, offset: int, bit: int = 0) -> None:
        """Turn one bit of a partition; `offset` counts bytes from its start."""
        where = self.partition(partition)
        if not 0 <= offset < where.size:
            raise VMError(f"partition {where.number} has {where.size} bytes, none at {offset}")
        byte = self.read(where.start + offset, 1)[0]
        self.write(where.start + offset, bytes([byte ^ (1 << bit)]))

    def spoil(self, partition: str | int, every: int = MIB, length: int | None = None) -> None:
        """Turn one bit in every `every` bytes of a partition, so that whatever is read first is hit."""
        where = self.partition(partition)
        with self._open() as file:
            for offset in range(where.start, where.start + (length or where.size), every):
                file.seek(offset)
                byte = file.read(1)[0]
                file.seek(offset)
                file.write(bytes([byte ^ 1]))

    def swap_partitions(self, a: str | int, b: str | int) -> None:
        """Each keeps its name and identity, and has the other's place and content."""
        tables = gpt.read_tables(self.read, self.size)
        first, second = self.partition(a).number, self.partition(b).number
        for table in filter(None, (tables.primary, tables.backup)):
            entries = gpt.exchange(table.entries, table.entry_size, first, second)
            gpt.rewrite(self.read, self.write, table, entries)

    def fill_partition(self, partition: str | int, source: Path, offset: int = 0, size: int | None = None) -> None:
        """Write a file, or a part of one, to the start of a partition."""
        where = self.partition(partition)
        left = min(where.size, size if size is not None else source.stat().st_size - offset)
        with source.open("rb") as data, self._open() as file:
            data.seek(offset)
            file.seek(where.start)
            while left > 0 and (chunk := data.read(min(left, 4 * MIB))):
                file.write(chunk)
                left -= len(chunk)

    def break_table(self, *, backup: bool = False) -> None:
        """As if the header's block had been torn by a power cut."""
        table = self.table()
        self.write((table.alternate_lba if backup else 1) * gpt.SECTOR + 64, b"\xff" * 64)

    def resize(self, size: int) -> None:
        """Cut, or add empty space; the partition table stays as it is."""
        with self._open() as file:
            file.truncate(size)

    # ------------------------------------------------------------------- ESP
    def _esp(self) -> str:
        return f"{self.make_raw()}@@{self.partition('esp').start}"

    def esp_list(self, folder: str) -> list[str]:
        """Names of the files in a folder of the EFI system partition."""
        listing = tool("mdir", "-b", "-i", self._esp(), f"::/{folder}").decode()
        return [line.rstrip("/").rsplit("/", 1)[-1] for line in listing.splitlines() if line.strip()]

    def esp_copy_out(self, path: str, target: Path) -> None:
        tool("mcopy", "-n", "-o", "-i", self._esp(), f"::/{path}", target)

    def esp_copy_in(self, source: Path, path: str) -> None:
        tool("mcopy", "-n", "-o", "-i", self._esp(), source, f"::/{path}")

    def esp_make_folder(self, path: str) -> None:
        tool("mmd", "-D", "s", "-i", self._esp(), f"::/{path}")

    def esp_delete(self, path: str) -> None:
        tool("mdel", "-i", self._esp(), f"::/{path}")

    def kernel(self) -> str:
        """The path on the ESP of the one unified kernel image."""
        names = [each for each in self.esp_list("EFI/Linux") if each.lower().endswith(".efi")]
        if len(names) != 1:
            raise VMError(f"expected one unified kernel image, found {names}")
        return f"EFI/Linux/{names[0]}"

    def change_esp_file(self, path: str, change: Callable[[bytes], bytes]) -> None:
        """Replace a file by `change` of its bytes; a file that stays the same is an error of the test."""
        held = self.path.parent / "esp-file"
        self.esp_copy_out(path, held)
        before = held.read_bytes()
        after = change(before)
        if after == before:
            raise VMError(f"{path} did not change")
        held.write_bytes(after)
        self.esp_copy_in(held, path)
        held.unlink()


# ---------------------------------------------------------- QEMU's view of a disk
def plain_node(disk: Disk, node: str) -> list[str]:
    """Without regard to flushes: fast, and a killed QEMU loses nothing that it has written."""
    return [
        "-blockdev",
        f"driver={disk.format},node-name={node},discard=unmap,detect-zeroes=off,cache.no-flush=on,"
        f"file.driver=file,file.filename={disk.path},file.cache.no-flush=on",
    ]


def failing_node(disk: Disk, node: str, failing: Failing, folder: Path) -> list[str]:
    """QEMU's blkdebug counts the writes in its states, one state a write, and refuses in the last."""
    if disk.format != "qcow2":
        raise VMError("only the qcow2 driver announces its writes to blkdebug")
    rules = folder / "failing.conf"
    last = failing.writes + 1
    steps = [
        f'[set-state]\nstate = "{each}"\nevent = "write_aio"\nnew_state = "{each + 1}"\n' for each in range(1, last)
    ]
    refuse = f'[inject-error]\nstate = "{last}"\nevent = "write_aio"\nerrno = "5"\nonce = "off"\nimmediately = "off"\n'
    rules.write_text("\n".join([*steps, refuse]))
    return [
        "-blockdev",
        f"driver=qcow2,node-name={node},discard=unmap,cache.no-flush=on,file.driver=blkdebug,file.config={rules},"
        f"file.image.driver=file,file.image.filename={disk.path},file.image.cache.no-flush=on",
    ]


def recording_node(disk: Disk, node: str, log: Path) -> list[str]:
    """Every write, discard and flush of the guest is appended to `log`, in the order of their completion."""
    disk.make_raw()
    log.write_bytes(b"")
    return [
        "-blockdev",
        f"driver=blklogwrites,node-name={node},discard=unmap,log-sector-size=512,log-super-update-interval=64,"
        f"file.driver=raw,file.discard=unmap,file.cache.no-flush=on,file.file.driver=file,"
        f"file.file.filename={disk.path},file.file.cache.no-flush=on,file.file.discard=unmap,"
        f"log.driver=file,log.filename={log},log.cache.no-flush=on",
    ]
