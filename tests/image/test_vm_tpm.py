"""The software TPM of a virtual machine: what is kept, and what clearing, replacing and locking do."""

from __future__ import annotations

from pathlib import Path

import pytest

from image.vm.tpm import SoftwareTPM

pytestmark = pytest.mark.tools


@pytest.fixture
def tpm(tmp_path: Path) -> SoftwareTPM:
    return SoftwareTPM(tmp_path)


def seed(tpm: SoftwareTPM) -> str:
    """The name of the owner's primary key, which follows from the owner's seed."""
    with tpm.tools() as run:
        context = str(tpm.state.parent / "primary")
        run("tpm2_createprimary", "-Q", "-C", "o", "-c", context)
        return next(line for line in run("tpm2_readpublic", "-c", context).splitlines() if line.startswith("name:"))


def locked(tpm: SoftwareTPM) -> bool:
    with tpm.tools() as run:
        return "inLockout:                 1" in run("tpm2_getcap", "properties-variable")


def test_it_is_the_same_after_power_off_and_in_a_copy(tpm: SoftwareTPM, tmp_path: Path) -> None:
    first = seed(tpm)
    (tmp_path / "copy").mkdir()
    tpm.copy_to(tmp_path / "copy")
    assert seed(tpm) == seed(SoftwareTPM(tmp_path / "copy")) == first


def test_cleared_or_replaced_it_has_another_seed(tpm: SoftwareTPM) -> None:
    first = seed(tpm)
    tpm.clear()
    second = seed(tpm)
    tpm.replace()
    assert len({first, second, seed(tpm)}) == 3


def test_it_stays_locked_over_a_power_cycle(tpm: SoftwareTPM) -> None:
    assert not locked(tpm)
    tpm.lock_out()
    assert locked(tpm)
