"""What is inside of LUKS in each state of a disk, without device-mapper: aes-xts-plain64, block by block."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from image.vm.crash import Medium, State
from image.vm.process import tool
from image.vm.writelog import WriteLog

CHUNK = 4 << 20


class Plaintext:
    """The payload in [start, end) of the disk. Only what a state changed is decrypted: most of it stays the same."""

    def __init__(
        self, log: WriteLog, medium: Medium, key: bytes, start: int, end: int, sector: int, folder: Path
    ) -> None:
        self._log, self._medium = log, medium
        self._key, self._sector = key, sector
        self._start, self._end = start, end
        self._path, self._copy = folder / "plain", folder / "var"
        with self._path.open("wb") as file:
            file.truncate(end - start)
        self._durable = 0

    def of(self, state: State) -> Path:
        """A file system image, to be written to at will; the medium must be in `state`."""
        durable = self._log.entries[self._durable : state.durable]
        self._renew(self._path, ((each.start, each.end, each.discards) for each in durable), durable_only=True)
        self._durable = state.durable
        tool("cp", "--sparse=always", "--reflink=auto", self._path, self._copy)
        pieces = ((each.start, each.start + each.size, each.entry.discards) for each in state.kept)
        self._renew(self._copy, pieces, durable_only=False)
        return self._copy

    def _renew(self, path: Path, ranges: Iterable[tuple[int, int, bool]], *, durable_only: bool) -> None:
        for start, end, discarded in ranges:
            # Whole sectors: a torn one is garbage as a whole, as dm-crypt would read it.
            first = max(start, self._start) - (max(start, self._start) - self._start) % self._sector
            last = min(end, self._end)
            last += -(last - self._start) % self._sector
            if first >= last:
                continue
            emptied = discarded or last - first > CHUNK
            if emptied:
                tool("fallocate", "--punch-hole", "-o", str(first - self._start), "-l", str(last - first), path)
            # From the medium as it is now, so what was written there later is read as well.
            with path.open("r+b") as file:
                for at in range(first, last, CHUNK):
                    data = self._medium.read(at, min(CHUNK, last - at), durable_only=durable_only)
                    if emptied and data == bytes(len(data)):
                        continue
                    file.seek(at - self._start)
                    file.write(self._decrypted(data, at - self._start))

    def _decrypted(self, data: bytes, offset: int) -> bytes:
        """A sector of zeros was never written, or was discarded, and stays one."""
        zeros = bytes(self._sector)
        parts = []
        for at in range(0, len(data), self._sector):
            block = data[at : at + self._sector]
            if block != zeros:
                # The tweak counts blocks of 512 bytes, whatever the sector size.
                tweak = ((offset + at) // 512).to_bytes(16, "little")
                decryptor = Cipher(algorithms.AES(self._key), modes.XTS(tweak)).decryptor()
                block = decryptor.update(block) + decryptor.finalize()
            parts.append(block)
        return b"".join(parts)
