"""The boot bench: how it reads a guest's clock, and that each machine keeps its disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

from ai_assistant.daemon.api.server import ANSWERS
from bench import boot
from image.vm import VM


class Machine:
    """A guest that took 2 s in the boot loader, 30.5 s to the unit, 1.5 s more until its API answers."""

    made: ClassVar[list[Path]] = []
    serves = True

    def __init__(self, image: Path, **_: Any) -> None:
        self.made.append(image)
        self.verbs: list[str] = []

    def power_on(self) -> None:
        self.verbs.append("on")

    def power_off(self) -> None:
        self.verbs.append("off")

    def wait_ready(self) -> float:
        return 1.0

    def run(self, *command: str, **_: Any) -> str:
        if "LoaderTimestampMonotonic" in command[-1]:
            return "2000000\n"
        if "--property=ActiveEnterTimestampMonotonic" in command:
            return "30500000\n" if command[-1] == "ai-assistantd.service" else "20000000\n"
        if command[:2] == ("systemd-analyze", "critical-chain"):
            return "ai-assistantd.service +2s\n  └─ssh.service @1s\n    └─var.mount @3s +10ms\n"
        if command[0] == "journalctl":
            said = [("1000000", "is ready"), ("32000000", ANSWERS), ("90000000", ANSWERS)]
            return "".join(
                json.dumps({"MESSAGE": text, "__MONOTONIC_TIMESTAMP": at}) + "\n" for at, text in said if self.serves
            )
        return "running\n"


def test_the_time_is_the_boot_loaders_and_the_units() -> None:
    assert boot.seconds(cast(VM, Machine(Path("x"))), "ai-assistantd.service") == pytest.approx(34.0)
    assert boot.seconds(cast(VM, Machine(Path("x"))), "multi-user.target") == pytest.approx(22.0)


def test_a_daemon_that_never_serves_is_no_time() -> None:
    machine = Machine(Path("x"))
    machine.serves = False
    with pytest.raises(RuntimeError, match="never said"):
        boot.seconds(cast(VM, machine), "ai-assistantd.service")


def test_first_boots_do_not_count_and_disks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "VM", Machine)
    Machine.made.clear()
    machines: dict[Path, VM] = {}
    for _ in range(3):
        assert boot.boot(Path("ours"), "ai-assistantd.service", machines) == pytest.approx(34.0)
        assert boot.boot(Path("plain"), "multi-user.target", machines) == pytest.approx(22.0)
    assert Machine.made == [Path("ours"), Path("plain")]
    assert cast(Any, machines[Path("ours")]).verbs == ["on", "off"] * 4


def test_only_units_of_ours_are_shown() -> None:
    shown = boot.slow_units(cast(VM, Machine(Path("x"))))
    assert "ssh" not in shown
    assert shown.count("\n") == 1
