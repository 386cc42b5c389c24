"""What a disk is after a power cut: judged on disks that systemd-repart makes here, offline."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from image.vm.crash import Medium, State
from image.vm.disk import Disk
from image.vm.judge import Judge, Kind, Verdict, read_volume_key
from image.vm.writelog import Flag, WriteLog, write_log

pytestmark = pytest.mark.tools

MIB = 2**20
PARTITIONS = {
    "10-esp": "Type=esp\nFormat=vfat\nCopyFiles=/loader.conf:/loader/loader.conf\nSizeMinBytes=64M\nSizeMaxBytes=64M\n",
    "20-root": "Type=root\nLabel=root_1\nFormat=ext4\nSizeMinBytes=16M\nSizeMaxBytes=16M\n",
}
VAR = "Type=var\nLabel=var\nFormat=ext4\nSizeMinBytes=80M\n"
PASSPHRASE = "a recovery key"


def repart(folder: Path, partitions: dict[str, str], disk: Path, *options: str) -> None:
    definitions = folder / f"definitions-{disk.stem}"
    definitions.mkdir()
    for name, text in partitions.items():
        (definitions / f"{name}.conf").write_text(f"[Partition]\n{text}")
    (folder / "source").mkdir(exist_ok=True)
    (folder / "source/loader.conf").write_text("timeout 0\n")
    (folder / "key").touch(0o600)
    (folder / "key").write_text(PASSPHRASE)
    command = ["systemd-repart", "--dry-run=no", "--offline=yes", f"--definitions={definitions}", *options]
    command += [f"--copy-source={folder / 'source'}", f"--key-file={folder / 'key'}", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Gigabytes, so not kept as pytest's own would be."""
    with TemporaryDirectory(prefix="ai-assistant-power-cuts-") as folder:
        yield Path(folder)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    repart(tmp_path, PARTITIONS, path, "--empty=create", "--size=auto")
    return path


def first_boot(tmp_path: Path, image: Path, encrypt: str = "") -> bytes:
    """The disk after it."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(image.read_bytes().ljust(256 * MIB, b"\0"))
    repart(tmp_path, {**PARTITIONS, "40-var": VAR + encrypt}, disk)
    return disk.read_bytes()


@contextmanager
def judged(tmp_path: Path, image: Path, disk: bytes, volume_key: bytes = b"") -> Iterator[Verdict]:
    """`disk` as the outcome of a recording that wrote all of it."""
    base = tmp_path / "base"
    base.write_bytes(image.read_bytes().ljust(len(disk), b"\0"))
    before = base.read_bytes()
    changed = [at for at in range(0, len(disk), MIB) if disk[at : at + MIB] != before[at : at + MIB]]
    write_log(tmp_path / "log", [*((at, disk[at : at + MIB], Flag(0)) for at in changed), (0, b"", Flag.FLUSH)])
    with WriteLog(tmp_path / "log") as log, closing(Medium(log, base)) as medium:
        everything = len(log.entries)
        yield Judge(image, log, medium, tmp_path, volume_key).judge(State(everything, everything, (), "all"))


def test_the_image_itself_is_before_its_first_boot(tmp_path: Path, image: Path) -> None:
    with judged(tmp_path, image, image.read_bytes().ljust(256 * MIB, b"\0")) as verdict:
        assert (verdict.kind, verdict.problems) == (Kind.BEFORE, ())


def test_a_whole_first_boot_is_after_it(tmp_path: Path, image: Path) -> None:
    with judged(tmp_path, image, first_boot(tmp_path, image)) as verdict:
        assert (verdict.kind, verdict.problems) == (Kind.AFTER, ())


@pytest.mark.parametrize(
    ("where", "length", "says"),
    [
        ("esp", 16 * MIB, "loader.conf on the ESP"),
        ("root", 4096, "changed partition 2"),
        ("var", 4096, "neither LUKS nor ext4"),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, image: Path, where: str, length: int, says: str) -> None:
    first_boot(tmp_path, image)
    disk = Disk(tmp_path / "disk.raw")
    disk.write(disk.partition(where).start, b"\xa5" * length)
    with judged(tmp_path, image, disk.path.read_bytes()) as verdict:
        assert verdict.kind is Kind.BROKEN
        assert says in "; ".join(verdict.problems)


def test_an_encrypted_var_is_looked_into(tmp_path: Path, image: Path) -> None:
    """Without device-mapper. A key slot for a passphrase alone is not what the first boot makes, and is named."""
    first_boot(tmp_path, image, "Encrypt=key-file\n")
    disk = Disk(tmp_path / "disk.raw")
    var = disk.partition("var")
    key = read_volume_key(disk, var, PASSPHRASE)
    assert len(key) == 64
    with pytest.raises(Exception, match="No key available"):
        read_volume_key(disk, var, "another key")
    with judged(tmp_path, image, disk.path.read_bytes(), key) as verdict:
        assert verdict.problems == ("no key slot that the TPM opens, only []",)
    token = '{"type":"systemd-tpm2","keyslots":[],"tpm2-blob":"AA==","tpm2-pcrs":[7],"tpm2-policy-hash":"00"}'
    header = tmp_path / "header"
    header.write_bytes(disk.read(var.start, var.size))
    subprocess.run(["cryptsetup", "token", "import", header], input=token.encode(), check=True)
    disk.write(var.start, header.read_bytes())
    with judged(tmp_path, image, disk.path.read_bytes(), key) as verdict:
        assert (verdict.kind, verdict.problems) == (Kind.AFTER, ())
    # The whole of the file system's first group, superblock, bitmaps and inodes, and not the LUKS header.
    disk.write(var.start + 16 * MIB, b"\xa5" * 4 * MIB)
    with judged(tmp_path, image, disk.path.read_bytes(), key) as verdict:
        assert verdict.kind is Kind.BROKEN
        assert "e2fsck" in verdict.problems[0]


def test_a_luks_header_that_is_damaged_twice_is_named(tmp_path: Path, image: Path) -> None:
    first_boot(tmp_path, image, "Encrypt=key-file\n")
    disk = Disk(tmp_path / "disk.raw")
    var = disk.partition("var")
    for at in (4096, 16384 + 4096):
        disk.write(var.start + at, b"\xa5" * 64)
    with judged(tmp_path, image, disk.path.read_bytes()) as verdict:
        assert "LUKS header is damaged" in verdict.problems[0]
