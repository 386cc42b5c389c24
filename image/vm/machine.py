"""A virtual mini-PC: QEMU with OVMF, a software TPM, one disk, a serial console and the test profile's agent."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from image.vm.accelerator import accelerator
from image.vm.agent import AGENT_PORT, Agent, Answer, Monitor
from image.vm.console import Console
from image.vm.disk import Disk, Failing, failing_node, plain_node, recording_node
from image.vm.firmware import Firmware
from image.vm.process import VMError, finish, spawn
from image.vm.tpm import SoftwareTPM

GIB = 2**30
BOOT_S = 900.0


@dataclass(frozen=True)
class ExtraDisk:
    """A further disk; `usb` makes it a removable stick, `first` lets the firmware try it before the machine's own."""

    disk: Disk
    usb: bool = False
    first: bool = False


@dataclass(frozen=True)
class Hardware:
    """What the machine is made of at its next power-on."""

    memory_mib: int = 2048
    secure_boot: bool = False
    tpm: bool = True
    network: bool = True
    internet: bool = False
    clock: str = ""  # such as 1970-01-01T00:00:00; empty is now
    cmdline: str = ""  # for the boot stub, which appends it while Secure Boot is off
    smbios: tuple[str, ...] = ()  # OEM strings, such as io.systemd.credential:NAME=VALUE
    extra_disks: tuple[ExtraDisk, ...] = ()
    failing: Failing | None = None
    record: Path | None = None  # a log of every write to the disk


class VM:
    """A machine whose disk begins as `image`; the image itself never changes. A context manager: all ends with it."""

    live: ClassVar[weakref.WeakSet[VM]] = weakref.WeakSet()

    def __init__(
        self, image: Path, *, disk_gib: float = 4, disk_size: int = 0, interactive: bool = False, **hardware: Any
    ) -> None:
        self.image = image.resolve()
        if not self.image.exists():
            raise VMError(f"{self.image} does not exist: run make image")
        self._new(Hardware(**hardware), interactive)
        size = disk_size or self.image.stat().st_size + int(disk_gib * GIB)
        self.disk = Disk.overlay(self.base, self.image, size)
        self.firmware = Firmware(self.base, secure_boot=self.hardware.secure_boot)

    def _new(self, hardware: Hardware, interactive: bool) -> None:
        self.hardware = hardware
        self.interactive = interactive
        self.base = Path(tempfile.mkdtemp(prefix="ai-assistant-vm-"))
        self.accelerator = accelerator()
        self.uuid = uuid.uuid4()
        self.tpm = SoftwareTPM(self.base)
        self.console = Console(self.base / "serial.log")
        self._words = self.base / "qemu.log"
        self._qemu: subprocess.Popen[bytes] | None = None
        self._agent: Agent | None = None
        self._monitor: Monitor | None = None
        self._sockets: list[socket.socket] = []
        VM.live.add(self)

    def clone(self, **changes: Any) -> VM:
        """The same machine again, off: its disk, its TPM, its firmware's variables, with other hardware if so said."""
        assert not self.is_on, "power off first"
        twin = VM.__new__(VM)
        twin.image = self.image
        twin._new(dataclasses.replace(self.hardware, **changes), self.interactive)
        twin.uuid = self.uuid
        twin.disk = self.disk.copy_to(twin.base)
        self.tpm.copy_to(twin.base)
        self.firmware.copy_to(twin.base)
        twin.firmware = Firmware(twin.base, secure_boot=twin.hardware.secure_boot)
        return twin

    def change(self, **changes: Any) -> None:
        """Other hardware from the next power-on."""
        self.hardware = dataclasses.replace(self.hardware, **changes)
        self.firmware.secure_boot = self.hardware.secure_boot

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ----------------------------------------------------------------- power
    @property
    def is_on(self) -> bool:
        return self._qemu is not None and self._qemu.poll() is None

    def power_on(self, *, snapshot: str = "") -> None:
        """From the firmware on, or from a `snapshot` that `save` made."""
        assert not self.is_on, "it is on"
        self._release()
        if self.hardware.tpm:
            self.tpm.start()
        ends = {}
        for name in ("agent", "monitor", "console"):
            ours, theirs = socket.socketpair()
            ends[name] = theirs
            self._sockets.append(ours)
        command = self._command({name: end.fileno() for name, end in ends.items()})
        if snapshot:
            command += ["-loadvm", snapshot]
        fds = [each.fileno() for each in ends.values()]
        with self._words.open("wb") as words:
            if self.interactive:
                self._qemu = spawn(command, stdin=None, pass_fds=fds)
            else:
                self._qemu = spawn(command, output=words, pass_fds=fds)
        for end in ends.values():
            end.close()
        agent, monitor, console = self._sockets
        self._agent = Agent(agent, lambda: self.is_on)
        self.console.power_on(console)
        try:
            self._monitor = Monitor(monitor, lambda: self.is_on)
        except VMError as error:
            raise self._error(f"QEMU did not start: {error}") from None

    def hard_kill(self) -> None:
        """The plug is pulled. What QEMU has written is kept by this host, so nothing of the disk is lost by it."""
        if self._qemu is not None and self._qemu.poll() is None:
            self._qemu.send_signal(signal.SIGKILL)
            self._qemu.wait()
        self._release()

    def power_off(self, timeout_s: float = 300.0) -> None:
        """The power button: the guest shuts down by itself."""
        self._ask("system_powerdown")
        self.wait_off(timeout_s)

    def wait_off(self, timeout_s: float = BOOT_S) -> None:
        assert self._qemu is not None
        try:
            self._qemu.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self._error(f"still on after {timeout_s:.0f} s") from None
        self._release()

    def wait(self) -> int:
        """Until the machine is off; QEMU's exit status."""
        assert self._qemu is not None
        return self._qemu.wait()

    def reboot(self, timeout_s: float = BOOT_S) -> None:
        """The guest starts again by itself; until the agent answers."""
        self._channel.post("systemctl", "reboot")
        self.wait_ready(timeout_s)

    def cold_boot(self, timeout_s: float = BOOT_S, **changes: Any) -> None:
        """Off, other hardware if so said, and on again; until the agent answers."""
        if self.is_on:
            self.power_off()
        self.change(**changes)
        self.power_on()
        self.wait_ready(timeout_s)

    def reset(self) -> None:
        """The reset button."""
        self._ask("system_reset")

    @property
    def was_on(self) -> bool:
        """Whether there is anything to report of it."""
        return self.console.cycles > 0

    @property
    def resets(self) -> int:
        """How often the machine has started again since power-on."""
        assert self._monitor is not None
        return self._monitor.count("RESET")

    # -------------------------------------------------------------- snapshots
    def save(self, name: str = "ready") -> None:
        """Keep the running machine, TPM and all, in its qcow2 files; it runs on."""
        self._human(f"savevm {name}")

    def restore(self, name: str = "ready") -> None:
        """Back to what `save` kept, in seconds."""
        self._human(f"loadvm {name}")

    # ---------------------------------------------------------- inside the guest
    def wait_ready(self, timeout_s: float = BOOT_S) -> float:
        """Wait for the agent of the test profile; seconds from here."""
        started = time.monotonic()
        try:
            self._channel.wait_ready(timeout_s)
        except VMError as error:
            raise self._error(str(error)) from None
        return time.monotonic() - started

    def execute(self, *command: str, timeout_s: float = 120.0) -> Answer:
        """Run a command in the guest, however it ends."""
        try:
            return self._channel.execute(*command, timeout_s=timeout_s)
        except VMError as error:
            raise self._error(str(error)) from None

    def run(self, *command: str, timeout_s: float = 120.0, check: bool = True) -> str:
        """Run a command in the guest and return its standard output; its failure is a VMError."""
        answer = self.execute(*command, timeout_s=timeout_s)
        if check and answer.code != 0:
            raise VMError(f"{command} ended with {answer.code}\n{answer.stdout}{answer.stderr}")
        return answer.stdout

    def read_file(self, path: str) -> bytes:
        return self._channel.read_file(path)

    def wait_for_console(self, *texts: str, timeout_s: float = BOOT_S) -> str:
        """Until the console says one of `texts`, after what was last waited for; which one."""
        found = self.console.wait_for(*texts, timeout_s=timeout_s)
        if found is None:
            raise self._error(f"the console did not say {' or '.join(map(repr, texts))} within {timeout_s:.0f} s")
        return found

    def type_on_console(self, text: str, end: str = "\r") -> None:
        self.console.type(text + end)

    def serial(self) -> str:
        return self.console.tail()

    def journal(self) -> str:
        """This boot's journal, for a person who looks for a failure."""
        lines = self.run("journalctl", "--boot", "--no-pager", "--output=short-monotonic", "--lines=2000", timeout_s=60)
        # The audit log says each start of a service again, twice.
        return "".join(each for each in lines.splitlines(keepends=True) if " audit" not in each)

    def report(self) -> str:
        """The console and, when the agent still answers, the journal."""
        parts = [f"--- console, seconds since power-on\n{self.serial()}"]
        if self.is_on and self._agent is not None and not self.interactive:
            with contextlib.suppress(VMError):
                parts.append(f"--- journal\n{self.journal()[-20000:]}")
        return "\n".join(parts)

    # --------------------------------------------------------------- the end
    def stop(self) -> None:
        """Everything of this machine ends and its files go; idempotent."""
        if self._qemu is not None:
            finish(self._qemu)
        self._release()
        self.console.close()
        VM.live.discard(self)
        shutil.rmtree(self.base, ignore_errors=True)

    def _release(self) -> None:
        self.console.power_off()
        for each in self._sockets:
            each.close()
        self._sockets = []
        self._agent = self._monitor = None
        self._qemu = None
        self.tpm.stop()

    @property
    def _channel(self) -> Agent:
        assert self._agent is not None, "power on first"
        return self._agent

    def _ask(self, command: str) -> None:
        assert self._monitor is not None, "power on first"
        self._monitor.execute(command)

    def _human(self, line: str) -> None:
        assert self._monitor is not None, "power on first"
        self._monitor.human(line)

    def _error(self, message: str) -> VMError:
        return VMError(f"{message}\n{self._words.read_text(errors='replace')}{self.serial()}")

    # ------------------------------------------------------------------ QEMU
    def _command(self, ends: dict[str, int]) -> list[str]:
        hardware, kvm = self.hardware, self.accelerator == "kvm"
        command = [
            *("qemu-system-x86_64", "-nodefaults", "-display", "none", "-uuid", str(self.uuid)),
            *("-accel", "kvm" if kvm else "tcg,thread=multi,tb-size=1024", "-cpu", "host" if kvm else "max"),
            *("-smp", "2", "-m", str(hardware.memory_mib)),
            *self.firmware.arguments(),
            *("-device", "virtio-rng-pci", "-device", "virtio-serial"),
            *("-chardev", f"socket,id=agent,fd={ends['agent']}"),
            *("-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"),
            *("-chardev", f"socket,id=monitor,fd={ends['monitor']}", "-mon", "chardev=monitor,mode=control"),
        ]
        if self.interactive:
            command += ["-serial", "mon:stdio"]
        else:
            command += ["-chardev", f"socket,id=console,fd={ends['console']}", "-serial", "chardev:console"]
        if hardware.tpm:
            command += ["-chardev", f"socket,id=tpm,path={self.tpm.socket}"]
            command += ["-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0"]
        if hardware.network:
            command += ["-nic", "user,model=virtio-net-pci" + ("" if hardware.internet else ",restrict=on")]
        if hardware.clock:
            command += ["-rtc", f"base={hardware.clock}"]
        strings = list(hardware.smbios)
        if hardware.cmdline:
            strings.append(f"io.systemd.stub.kernel-cmdline-extra={hardware.cmdline}")
        for each in strings:
            command += ["-smbios", "type=11,value=" + each.replace(",", ",,")]
        return command + self._disks()

    def _disks(self) -> list[str]:
        hardware = self.hardware
        if hardware.record is not None:
            command = recording_node(self.disk, "disk", hardware.record)
        elif hardware.failing is not None:
            command = failing_node(self.disk, "disk", hardware.failing, self.base)
        else:
            command = plain_node(self.disk, "disk")
        # An error of the disk is the guest's to handle; QEMU would stop the machine when this host is full.
        command += ["-device", "virtio-blk-pci,drive=disk,bootindex=10,werror=report,rerror=report"]
        if any(each.usb for each in hardware.extra_disks):
            command += ["-device", "qemu-xhci"]
        for number, each in enumerate(hardware.extra_disks):
            node = f"extra{number}"
            kind = "usb-storage,removable=on" if each.usb else "virtio-blk-pci"
            command += plain_node(each.disk, node)
            command += ["-device", f"{kind},drive={node},bootindex={number + (1 if each.first else 20)}"]
        return command
