"""Every file that a verification reads or writes: logs, PCR values, the boot partition, what runs, saved evidence."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.errors import AlreadyExists, InvalidArgument
from ai_assistant.tee.errors import InvalidMeasurements, NeedsRoot, NoEventLog, NoMeasurements, NoTPM
from ai_assistant.tee.eventlog import MAX_LOG_BYTES, PCRS
from ai_assistant.tee.measurements import MAX_FILE_BYTES, MAX_SIGNATURE_BYTES, Measurements, load
from ai_assistant.tee.running import Root, Running

KEY = "usr/lib/ai-assistant/keys/release.pub"
_LOG = "sys/kernel/security/tpm0/binary_bios_measurements"
_SYSTEM_LOG = "run/log/systemd/tpm2-measure.log"
_LOADER_GUID = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
_FOLDER = "loader/ai-assistant"
_MAX_SMALL_BYTES = 64 * 1024
_MAX_PUBLISHED = 64
_LOCK_TRIES = 30

Runner = Callable[[Sequence[str]], str]


@dataclass(frozen=True, slots=True)
class Published:
    """measurements.json and its signature, as files."""

    name: str
    raw: bytes
    signature: bytes


def read(path: Path, limit: int = MAX_LOG_BYTES) -> bytes:
    """A file's content, or one byte more than the limit where it is longer: who parses it says that it is too big.

    Raises:
        OSError
    """
    with path.open("rb") as file:
        content = bytearray()
        # The kernel gives these files piece by piece, and with a size of 0.
        while len(content) <= limit and (piece := file.read(limit + 1 - len(content))):
            content += piece
        return bytes(content)


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, check=True, timeout=30).stdout.decode(errors="replace")


def _lock(descriptor: int) -> None:
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.1)
    # Whoever holds it that long is not systemd. The replay shows whether log and values fit.


class Machine:
    """The machine that this runs on; ``root`` is where its files are."""

    def __init__(self, root: Path = Path("/"), run: Runner = _run, *, superuser: bool | None = None) -> None:
        self._root, self._run = root, run
        self._superuser = os.geteuid() == 0 if superuser is None else superuser

    def demand_root(self) -> None:
        if not self._superuser:
            raise NeedsRoot(
                "only root may read the TPM's event log and the boot partition",
                hint="sudo ai-assistant verify-boot",
            )

    def key(self) -> bytes:
        """The release key, out of the root file system that verity protects."""
        try:
            return read(self._root / KEY, _MAX_SMALL_BYTES)
        except OSError as error:
            raise NoMeasurements(
                f"/{KEY} cannot be read: {error.strerror}", hint="is this AI Assistant OS? --key FILE names another"
            ) from error

    def pcrs(self) -> dict[int, bytes]:
        tpm = self._root / "sys/class/tpm/tpm0"
        if not tpm.exists():
            raise NoTPM(
                "this machine has no TPM, or it is switched off",
                hint="switch it on in the firmware setup (fTPM, PTT); without one, nobody can tell what was booted",
            )
        try:
            found = {pcr: bytes.fromhex(read(tpm / f"pcr-sha256/{pcr}", 256).decode("ascii")) for pcr in range(PCRS)}
        except FileNotFoundError as error:
            raise NoTPM(
                "the TPM has no SHA-256 bank", hint="switch it on in the firmware setup, and boot again"
            ) from error
        except (OSError, ValueError) as error:
            raise NoTPM(f"the TPM's values cannot be read: {error}", hint="dmesg | grep -i tpm") from error
        if any(len(value) != 32 for value in found.values()):
            raise NoTPM("the kernel gives PCR values of a wrong size", hint="dmesg | grep -i tpm")
        return found

    def event_log(self) -> bytes:
        try:
            return read(self._root / _LOG)
        except OSError as error:
            raise NoEventLog(
                f"/{_LOG} cannot be read: {error.strerror}",
                hint="the firmware must keep a TCG2 event log, and /sys/kernel/security must be mounted",
            ) from error

    def values(self) -> tuple[dict[int, bytes], bytes | None]:
        """The PCR values and systemd's log that belongs to them; None where it keeps none."""
        try:
            with (self._root / _SYSTEM_LOG).open("rb") as file:
                # systemd extends and logs under this lock: without it, values and log could be of two moments.
                _lock(file.fileno())
                return self.pcrs(), file.read(MAX_LOG_BYTES + 1)
        except FileNotFoundError:
            return self.pcrs(), None
        except OSError as error:
            raise NoEventLog(f"/{_SYSTEM_LOG} cannot be read: {error.strerror}") from error

    def running(self) -> Running:
        try:
            line = read(self._root / "proc/cmdline", _MAX_SMALL_BYTES).decode(errors="replace").rstrip("\n")
        except OSError as error:
            raise NoMeasurements(f"/proc/cmdline cannot be read: {error.strerror}") from error
        return Running(line, self._mounted_root(), self.uki())

    def _mounted_root(self) -> Root:
        mounts = [mount for mount in self._mounts() if mount[1] == "/"]
        if not mounts:
            return Root("nothing that /proc/self/mountinfo names", "")
        device, _, kind, source = mounts[-1]  # what lies on top
        try:
            uuid = read(self._root / f"sys/dev/block/{device}/dm/uuid", 256).decode(errors="replace").strip()
        except OSError:
            return Root(f"{kind} on {source}", "")
        if not uuid.startswith("CRYPT-VERITY-"):
            return Root(f"{kind} on {source} ({uuid.split('-')[0]} of the device-mapper)", "")
        major, _, minor = device.partition(":")
        try:
            return Root(source, self._run(["dmsetup", "table", "--major", major, "--minor", minor]))
        except (OSError, subprocess.SubprocessError) as error:
            raise NoMeasurements(
                f"dmsetup cannot say what / is made of: {error}", hint="the package dmsetup belongs to the image"
            ) from error

    def _mounts(self) -> list[tuple[str, str, str, str]]:
        """Device number, mount point, file system and source of each mount."""
        try:
            lines = read(self._root / "proc/self/mountinfo").decode(errors="replace").splitlines()
        except OSError:
            return []
        found = []
        for words in (line.split() for line in lines):
            if "-" in words and len(words) >= words.index("-") + 3:
                at = words.index("-")
                found.append((words[2], words[4], words[at + 1], words[at + 2]))
        return found

    def variable(self, name: str) -> str:
        """A text that the boot loader or the stub left in an EFI variable; empty where there is none."""
        try:
            raw = read(self._root / f"sys/firmware/efi/efivars/{name}-{_LOADER_GUID}", _MAX_SMALL_BYTES)
        except OSError:
            return ""
        # Four bytes of attributes come first.
        return raw[4:].decode("utf-16-le", errors="replace").rstrip("\0")

    def uki(self) -> str:
        """The file name of what was booted, without the boot counters that the loader puts into it."""
        said = self.variable("StubImageIdentifier") or self.variable("LoaderEntrySelected")
        name = said.replace("\\", "/").rsplit("/", 1)[-1]
        return re.sub(r"\+\d+(-\d+)?(?=\.efi$)", "", name)

    def published(self) -> list[Published]:
        """What the boot partition holds about releases.

        Raises:
            NoMeasurements: no boot partition, or nothing on it.
        """
        with self._boot_partition() as esp:
            folder = esp / _FOLDER
            try:
                names = sorted(path.name for path in folder.iterdir() if path.name.endswith(".json"))
                found = []
                for name in names[:_MAX_PUBLISHED]:
                    signature = folder / f"{name}.sig"
                    given = read(signature, MAX_SIGNATURE_BYTES) if signature.exists() else b""
                    found.append(Published(name, read(folder / name, MAX_FILE_BYTES), given))
            except FileNotFoundError:
                found = []
            except OSError as error:
                raise NoMeasurements(f"the boot partition cannot be read: {error.strerror}") from error
        if not found:
            raise NoMeasurements(
                f"the boot partition has no published measurements (/{_FOLDER})",
                hint="--measurements FILE takes them from elsewhere: they stand beside every release",
            )
        return found

    @contextmanager
    def _boot_partition(self) -> Iterator[Path]:
        part = self.variable("LoaderDevicePartUUID").lower()
        if not re.fullmatch(r"[0-9a-f-]{36}", part):
            raise NoMeasurements(
                "the boot loader does not say from which partition it was started",
                hint="was this machine started with UEFI and systemd-boot? --measurements FILE does without",
            )
        try:
            device = (self._root / "dev/disk/by-partuuid" / part).resolve(strict=True)
            number = read(self._root / f"sys/class/block/{device.name}/dev", 64).decode(errors="replace").strip()
        except OSError as error:
            raise NoMeasurements(
                f"the boot partition {part} is not there any more", hint="was the disk or stick taken out?"
            ) from error
        for place in ("efi", "boot"):
            try:  # so that an automatic mount happens
                next((self._root / place).iterdir(), None)
            except OSError:
                continue
        for mounted, point, kind, _ in self._mounts():
            if mounted == number and kind != "autofs":
                yield self._root / point.lstrip("/").replace("\\040", " ")
                return
        with self._mounted(device) as private:
            yield private

    @contextmanager
    def _mounted(self, device: Path) -> Iterator[Path]:
        # Made with mode 0700: nobody else gets to the partition through it.
        place = tempfile.mkdtemp(prefix="ai-assistant-esp-", dir=self._root / "run")
        try:
            try:
                self._run(["mount", "-t", "vfat", "-o", "ro,nosuid,nodev,noexec,umask=0077", str(device), place])
            except (OSError, subprocess.SubprocessError) as error:
                raise NoMeasurements(f"the boot partition {device.name} cannot be mounted: {error}") from error
            try:
                yield Path(place)
            finally:
                self._unmount(place)
        finally:
            # Never a whole tree: while something is mounted there, the tree is the boot partition.
            with suppress(OSError):
                Path(place).rmdir()

    def _unmount(self, place: str) -> None:
        try:
            self._run(["umount", place])
        except (OSError, subprocess.SubprocessError):
            try:  # Somebody looks into it: it goes when they leave.
                self._run(["umount", "--lazy", place])
            except (OSError, subprocess.SubprocessError) as error:
                raise NoMeasurements(
                    f"the boot partition stays mounted at {place}: {error}", hint=f"umount {place}"
                ) from error


def choose(candidates: Sequence[Published], key: bytes, uki: str, command_line: str) -> tuple[Published, Measurements]:
    """The measurements of what was booted: by the image's name, else by the root hash, else the only ones there.

    Only what the release key has signed is looked at.

    Raises:
        InvalidMeasurements: nothing there is signed, or readable. NoMeasurements: nothing is for this boot.
    """
    good: list[tuple[Published, Measurements]] = []
    bad: list[InvalidMeasurements] = []
    for each in candidates:
        try:
            good.append((each, load(each.raw, each.signature, key)))
        except InvalidMeasurements as error:
            bad.append(type(error)(f"{each.name}: {error.message}", hint=error.hint))
    if not good:
        raise bad[0] if bad else NoMeasurements("there are no measurements to choose from")
    hashes = {word.removeprefix("roothash=") for word in command_line.split() if word.startswith("roothash=")}
    for fits in (lambda m: m.uki == uki, lambda m: m.root_hash in hashes):
        found = [pair for pair in good if fits(pair[1])]
        if found:
            return found[-1]
    if len(good) == 1:
        return good[0]
    raise NoMeasurements(
        f"none of the published measurements is for {uki or 'what was booted'}",
        hint=f"there are those of {', '.join(m.version for _, m in good)}; --measurements FILE names others",
    )


def given(path: Path, limit: int = MAX_LOG_BYTES) -> bytes:
    """A file that the caller named.

    Raises:
        InvalidArgument
    """
    try:
        return read(path, limit)
    except OSError as error:
        raise InvalidArgument(f"cannot read {path}: {error.strerror}") from error


def save(folder: Path, files: dict[str, bytes]) -> None:
    """Write evidence into a folder that is new or empty, for root alone.

    Raises:
        AlreadyExists: evidence is never overwritten. InvalidArgument: it cannot be written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise AlreadyExists(f"{folder} is not empty", hint="evidence is not overwritten: name a new folder")
    except OSError as error:
        raise InvalidArgument(f"cannot write to {folder}: {error.strerror}") from error
    add(folder, files)


def add(folder: Path, files: dict[str, bytes]) -> None:
    """Write more evidence into the folder that `save` made.

    Raises:
        InvalidArgument: it cannot be written.
    """
    try:
        for name, content in files.items():
            target = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(target, "wb") as file:
                file.write(content)
    except OSError as error:
        raise InvalidArgument(f"cannot write to {folder}: {error.strerror}") from error


def pcrs_json(pcrs: dict[int, bytes]) -> bytes:
    return json.dumps({str(pcr): value.hex() for pcr, value in sorted(pcrs.items())}, indent=1).encode() + b"\n"
