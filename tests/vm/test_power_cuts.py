"""A power cut at any point of the first boot: what it leaves is either begun again or finished.

One first boot is recorded, write by write and flush by flush. 500 of the states that a power cut could have left are
looked at without booting them, then some are booted. Killing QEMU would test nothing: this host keeps what it wrote.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from image.vm import VM, Disk
from image.vm.crash import Medium
from image.vm.judge import Judge, Kind, Verdict, read_volume_key, survey
from image.vm.process import tool
from image.vm.writelog import WriteLog
from tests.vm.conftest import RECOVERY_KEY, storage, verify_boot
from tests.vm.ledger import seed

pytestmark = pytest.mark.vm_long

STATES = 500
BOOTS = 5
Figure = Callable[[str, str], None]


@dataclass(frozen=True)
class Recording:
    """A machine that is off after its first boot, the log of that boot, and LUKS's volume key ("" without LUKS)."""

    machine: VM
    log: Path
    volume_key: bytes


def record(image: Path, folder: Path, *, tpm: bool) -> Iterator[Recording]:
    log = folder / "writes.log"
    with VM(image, secure_boot=True, tpm=tpm, record=log) as machine:
        machine.power_on()
        machine.wait_ready()
        machine.run("systemctl", "is-system-running", "--wait", timeout_s=600, check=False)
        key = machine.run("cat", RECOVERY_KEY).strip() if tpm else ""
        machine.run("sync")  # the log's header is written with a flush
        machine.hard_kill()
        machine.change(record=None)
        var = machine.disk.partition("var")
        yield Recording(machine, log, read_volume_key(machine.disk, var, key) if key else b"")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Gigabytes, so not kept as pytest's own would be."""
    with TemporaryDirectory(prefix="ai-assistant-power-cuts-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def encrypted(image: Path) -> Iterator[Recording]:
    with TemporaryDirectory(prefix="ai-assistant-recording-") as folder:
        yield from record(image, Path(folder), tpm=True)


@pytest.fixture(scope="module")
def plain(image: Path) -> Iterator[Recording]:
    with TemporaryDirectory(prefix="ai-assistant-recording-") as folder:
        yield from record(image, Path(folder), tpm=False)


def base(image: Path, recording: Recording, folder: Path) -> Path:
    """The disk as it was before."""
    path = folder / "base.raw"
    tool("cp", "--sparse=always", image, path)
    with path.open("r+b") as file:
        file.truncate(recording.machine.disk.size)
    return path


def look(image: Path, recording: Recording, count: int, *, obeys_flushes: bool = True) -> list[Verdict]:
    with TemporaryDirectory(prefix="ai-assistant-power-cuts-") as name, WriteLog(recording.log) as log:
        folder = Path(name)
        with closing(Medium(log, base(image, recording, folder))) as medium:
            judge = Judge(image, log, medium, folder, recording.volume_key)
            return survey(judge, count, seed(), obeys_flushes=obeys_flushes)


@pytest.fixture(scope="module")
def encrypted_states(image: Path, encrypted: Recording) -> list[Verdict]:
    return look(image, encrypted, STATES)


@pytest.fixture(scope="module")
def plain_states(image: Path, plain: Recording) -> list[Verdict]:
    return look(image, plain, STATES)


def summary(verdicts: list[Verdict]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(each.kind for each in verdicts).most_common())
    torn = sum(any("primary" in problem for problem in each.tables) for each in verdicts)
    repaired = sum(each.repaired for each in verdicts)
    return (
        f"{len(verdicts)} states, seed {seed()}: {kinds}; "
        f"{torn} with a torn primary table, {repaired} with a torn superblock"
    )


@pytest.mark.parametrize("kind", ["encrypted", "plain"])
def test_no_power_cut_breaks_the_disk(kind: str, figure: Figure, request: pytest.FixtureRequest) -> None:
    verdicts: list[Verdict] = request.getfixturevalue(f"{kind}_states")
    figure(f"power cuts, {kind} /var", summary(verdicts))
    assert len(verdicts) >= STATES
    broken = [str(each) for each in verdicts if each.kind is Kind.BROKEN]
    assert not broken, f"{len(broken)} of {len(verdicts)}:\n" + "\n".join(broken[:10])
    kinds = {each.kind for each in verdicts}
    assert kinds == {Kind.BEFORE, Kind.AFTER}, "the choice of states misses one side of the commit"
    assert any(each.tables and "primary" in each.tables[0] for each in verdicts), "no torn primary table among them"


def test_a_disk_that_lies_about_flushes_would_be_broken(plain: Recording, image: Path) -> None:
    """The same recording without its flushes: if no state were broken then, the look at them would be worth nothing."""
    verdicts = look(image, plain, 200, obeys_flushes=False)
    assert any(each.kind is Kind.BROKEN for each in verdicts)


def choose(verdicts: list[Verdict]) -> list[Verdict]:
    """Some of each kind, a torn primary table and a torn superblock among them where there are such states."""
    lot = random.Random(seed())
    groups = [
        [each for each in verdicts if each.kind is Kind.AFTER and any("primary" in problem for problem in each.tables)],
        [each for each in verdicts if each.repaired],
        [each for each in verdicts if each.kind is Kind.BEFORE],
        [each for each in verdicts if each.kind is Kind.AFTER and each.state.kept],
    ]
    chosen = {id(each): each for each in (lot.choice(group) for group in groups if group)}
    while len(chosen) < BOOTS:
        each = lot.choice(verdicts)
        chosen[id(each)] = each
    return sorted(chosen.values(), key=lambda each: (each.state.durable, each.state.cut))


def test_the_machine_comes_back(
    encrypted: Recording, encrypted_states: list[Verdict], image: Path, tmp_path: Path, figure: Figure
) -> None:
    """Booted, with the TPM and the firmware's variables of the recorded boot."""
    chosen = choose([each for each in encrypted_states if each.kind is not Kind.BROKEN])
    assert len(chosen) >= BOOTS
    came_back = []
    with WriteLog(encrypted.log) as log, closing(Medium(log, base(image, encrypted, tmp_path))) as medium:
        for verdict in chosen:
            medium.become(verdict.state)
            with encrypted.machine.clone() as machine:
                machine.disk.path.unlink()
                machine.disk = Disk(machine.base / "disk.raw")
                medium.save(machine.disk.path)
                machine.power_on()
                try:
                    machine.wait_ready()
                    said = storage(machine)
                except Exception as error:
                    raise AssertionError(f"{verdict}\n{error}") from error
                assert said["encryption"] == "tpm2", f"{verdict}\n{said}"
                assert said["opened_by"] == "tpm2", f"{verdict}\n{said}"
                assert said["first_boot"] is (verdict.kind is Kind.BEFORE), f"{verdict}\n{said}"
                machine.run("systemctl", "is-system-running", "--wait", timeout_s=600, check=False)
                assert machine.run("systemctl", "--failed", "--no-legend", "--plain") == "", str(verdict)
                code, words = verify_boot(machine)
                assert code == 0, f"{verdict}\n{words}"
                machine.power_off()
            came_back.append(str(verdict.state))
    figure("power cuts, booted", "; ".join(came_back))
