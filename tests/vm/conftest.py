"""What the stories share: machines that have had their first boot, and a report when one fails.

A story takes a copy of such a machine, does something to it while it is off, and looks at what happens then. A failing
one prints the console and, when its agent still answers, the journal; no process outlives it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from image.container import image_path
from image.vm import VM
from image.vm.process import tool
from tests.vm.ledger import Ledger

RECOVERY_KEY = "/var/lib/ai-assistant-recovery/key"
STATE = "/run/ai-assistant-storage/state.json"
SNAPSHOT = "ready"


@dataclass(frozen=True)
class Installed:
    """A machine that is off after its first boot, and its recovery key ("" where there is none).

    `power_on(snapshot=SNAPSHOT)` goes on from when it was running, while its disk has not been changed from outside.
    """

    machine: VM
    recovery_key: str

    def copy(self, **changes: Any) -> VM:
        return self.machine.clone(**changes)


def storage(machine: VM) -> dict[str, Any]:
    """What the machine says about /var."""
    return dict(json.loads(machine.run("cat", STATE)))


def verify_boot(machine: VM) -> tuple[int | None, str]:
    """Exit status and words."""
    answer = machine.execute("ai-assistant", "verify-boot", timeout_s=300)
    return answer.code, answer.stdout + answer.stderr


def held(profile: str) -> Iterator[Path]:
    """A copy of an image for as long as machines stand on it: a build meanwhile would pull it away from under them."""
    source = image_path(profile)
    assert source.exists(), f"{source} does not exist: image/build {profile}"
    with tempfile.TemporaryDirectory(prefix="ai-assistant-vm-image-") as folder:
        tool("cp", "--sparse=always", "--reflink=auto", source, folder)
        yield Path(folder) / source.name


@pytest.fixture(scope="session")
def image() -> Iterator[Path]:
    yield from held("test")


@pytest.fixture(scope="session")
def production() -> Iterator[Path]:
    yield from held("production")


def first_boot(image: Path, **hardware: Any) -> Iterator[Installed]:
    with VM(image, **hardware) as machine:
        machine.power_on()
        machine.wait_ready()
        machine.run("systemctl", "is-system-running", "--wait", timeout_s=600, check=False)
        machine.run("touch", "/var/lib/kept")
        key = machine.run("cat", RECOVERY_KEY).strip() if storage(machine)["encryption"] == "tpm2" else ""
        machine.save(SNAPSHOT)
        machine.power_off()
        yield Installed(machine, key)


@pytest.fixture(scope="session")
def installed(image: Path) -> Iterator[Installed]:
    """With Secure Boot, from setup mode, and a TPM: as it is meant to be."""
    yield from first_boot(image, secure_boot=True)


@pytest.fixture(scope="session")
def installed_without_secure_boot(image: Path) -> Iterator[Installed]:
    yield from first_boot(image)


# ------------------------------------------------------------------ reports, and going on after a stop
_ledger = Ledger.from_environment()


@pytest.fixture
def figure() -> Callable[[str, str], None]:
    """Print a figure at the end of the run, and keep it with the run."""

    def note(name: str, value: str) -> None:
        _ledger.figures[name] = value
        _ledger.save()

    return note


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = [each for each in items if each.nodeid in _ledger.passed]
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [each for each in items if each.nodeid not in _ledger.passed]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.excinfo is not None:
        for machine in list(VM.live):
            if machine.was_on:
                report.sections.append((f"machine in {machine.base.name}", machine.report()))
    if report.when == "call" and report.passed and item.get_closest_marker("vm_long"):
        _ledger.passed[item.nodeid] = round(report.duration, 1)
        _ledger.save()
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _ledger.figures:
        terminalreporter.section("figures")
        for name, value in sorted(_ledger.figures.items()):
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(autouse=True, scope="session")
def _nothing_stays() -> Iterator[None]:
    yield
    for machine in list(VM.live):
        machine.stop()
