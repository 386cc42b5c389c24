"""Boot the built image in QEMU: OVMF, a software TPM, the image's own boot loader, kernel and verity root.

Run it in the tools tree:
    image/toolbox python3 -m image.vm boot [--image FILE] [--memory MIB]     the console on this terminal
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from image.container import image_path

FIRMWARE = Path("/usr/share/OVMF")
AGENT_PORT = "org.ai_assistant1.test"
# Real-mode code that writes 0x10 to the debug-exit port: QEMU then ends with (0x10 << 1) | 1.
PROBE = bytes.fromhex("b010e6f4f4ebfd").ljust(510, b"\0") + b"\x55\xaa"
PROBE_STATUS = 33


class VMError(Exception):
    """The machine did not do what was asked in time; the message ends with its console."""


@cache
def accelerator() -> str:
    """ "kvm" when a guest really runs under it, else "tcg": the device may exist and still not work."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    with tempfile.NamedTemporaryFile(suffix=".img") as sector:
        sector.write(PROBE)
        sector.flush()
        try:
            done = subprocess.run(
                [
                    "qemu-system-x86_64",
                    "-accel",
                    "kvm",
                    "-cpu",
                    "host",
                    "-m",
                    "64",
                    "-display",
                    "none",
                    "-nodefaults",
                    "-device",
                    "isa-debug-exit,iobase=0xf4",
                    "-drive",
                    f"file={sector.name},format=raw",
                ],
                capture_output=True,
                timeout=20,
                check=False,
            )
        except (subprocess.TimeoutExpired, OSError):
            return "tcg"
    return "kvm" if done.returncode == PROBE_STATUS else "tcg"


class VM:
    """A virtual machine on an overlay of the image; a context manager. The image itself never changes."""

    def __init__(
        self, image: Path, *, memory_mib: int = 2048, disk_gib: int = 4, interactive: bool = False, cmdline: str = ""
    ) -> None:
        self.image = image.resolve()
        self.memory_mib = memory_mib
        self.disk_gib = disk_gib
        self.interactive = interactive
        self.cmdline = cmdline
        self.base = Path(tempfile.mkdtemp(prefix="ai-assistant-vm-"))
        self.serial_log = self.base / "serial.log"
        self.accelerator = accelerator()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._agent: socket.socket | None = None
        self._received = b""
        self._next = 0

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Power on. The disk is the image and `disk_gib` of free space behind it."""
        if not self.image.exists():
            raise VMError(f"{self.image} does not exist: run make image")
        disk = self.base / "disk.qcow2"
        size = self.image.stat().st_size + self.disk_gib * 2**30
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", self.image, "-F", "raw", disk, str(size)], check=True
        )
        shutil.copy(FIRMWARE / "OVMF_VARS_4M.fd", self.base / "vars.fd")
        (self.base / "tpm").mkdir()
        self._processes.append(
            subprocess.Popen(
                [
                    "swtpm",
                    "socket",
                    "--tpm2",
                    f"--tpmstate=dir={self.base}/tpm",
                    f"--ctrl=type=unixio,path={self.base}/tpm.sock",
                    "--flags=startup-clear",
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        )
        self._wait_for(self.base / "tpm.sock")
        kvm = self.accelerator == "kvm"
        command = [
            "qemu-system-x86_64",
            "-machine",
            "q35",
            "-m",
            str(self.memory_mib),
            "-smp",
            "2",
            "-no-reboot",
            "-accel",
            "kvm" if kvm else "tcg,thread=multi,tb-size=1024",
            "-cpu",
            "host" if kvm else "max",
            "-drive",
            f"if=pflash,format=raw,unit=0,readonly=on,file={FIRMWARE}/OVMF_CODE_4M.fd",
            "-drive",
            f"if=pflash,format=raw,unit=1,file={self.base}/vars.fd",
            "-drive",
            f"if=virtio,format=qcow2,cache=unsafe,discard=unmap,file={disk}",
            "-chardev",
            f"socket,id=tpm,path={self.base}/tpm.sock",
            "-tpmdev",
            "emulator,id=tpm0,chardev=tpm",
            "-uuid",
            str(uuid.uuid4()),
            "-device",
            "tpm-crb,tpmdev=tpm0",
            "-device",
            "virtio-rng-pci",
            "-nodefaults",
            "-nic",
            "user,model=virtio-net-pci" + ("" if self.interactive else ",restrict=on"),
            "-device",
            "virtio-serial",
            "-chardev",
            f"socket,id=agent,path={self.base}/agent.sock,server=on,wait=off",
            "-device",
            f"virtserialport,chardev=agent,name={AGENT_PORT}",
        ]
        if self.cmdline:  # the boot stub appends it, while Secure Boot is off
            command += ["-smbios", f"type=11,value=io.systemd.stub.kernel-cmdline-extra={self.cmdline}"]
        if self.interactive:
            command += ["-display", "none", "-serial", "mon:stdio"]
        else:
            command += ["-display", "none", "-serial", f"file:{self.serial_log}"]
        self._processes.append(subprocess.Popen(command, stdin=None if self.interactive else subprocess.DEVNULL))
        if not self.interactive:
            self._wait_for(self.base / "agent.sock")

    def _wait_for(self, path: Path, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not path.exists():
            if time.monotonic() > deadline or any(each.poll() is not None for each in self._processes):
                raise VMError(f"{path.name} did not appear")
            time.sleep(0.05)

    def wait_ready(self, timeout_s: float = 900.0) -> float:
        """Wait for the agent of the test profile; seconds from here."""
        started = time.monotonic()
        self._agent = socket.socket(socket.AF_UNIX)
        self._agent.connect(str(self.base / "agent.sock"))
        while True:
            message = self._receive(timeout_s - (time.monotonic() - started))
            if message.get("ready"):
                return time.monotonic() - started

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        assert self._agent is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or self._processes[-1].poll() is not None:
                raise VMError(f"no answer from the machine within {timeout_s:.0f} s\n{self.serial()}")
            self._agent.settimeout(min(left, 1.0))
            with contextlib.suppress(TimeoutError):
                self._received += self._agent.recv(65536)
        line, _, self._received = self._received.partition(b"\n")
        return dict(json.loads(line))

    def run(self, *command: str, timeout_s: float = 120.0, check: bool = True) -> str:
        """Run a command in the guest and return its standard output; its failure is a VMError."""
        assert self._agent is not None, "wait_ready first"
        self._next += 1
        request = {"id": self._next, "command": list(command), "timeout_s": timeout_s}
        self._agent.sendall((json.dumps(request) + "\n").encode())
        while True:
            answer = self._receive(timeout_s + 30)
            if answer.get("id") == self._next:
                break
        if check and answer["code"] != 0:
            raise VMError(f"{command} ended with {answer['code']}\n{answer['stdout']}{answer['stderr']}")
        return str(answer["stdout"])

    def serial(self) -> str:
        return self.serial_log.read_text(errors="replace")[-8000:] if self.serial_log.exists() else ""

    def wait(self) -> int:
        """Until the machine is off."""
        return self._processes[-1].wait()

    def stop(self) -> None:
        """Power off hard; idempotent."""
        if self._agent is not None:
            self._agent.close()
        for process in reversed(self._processes):
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        shutil.rmtree(self.base, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vm", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("action", choices=("boot", "accelerator"))
    parser.add_argument("--image", type=Path, default=image_path())
    parser.add_argument("--memory", type=int, default=4096, help="MiB")
    options = parser.parse_args(arguments)
    if options.action == "accelerator":
        print(accelerator())
        return 0
    print(f"Booting under {accelerator()}; Ctrl-A X ends the machine.", flush=True)
    try:
        with VM(options.image, memory_mib=options.memory, disk_gib=8, interactive=True) as machine:
            return machine.wait()
    except VMError as error:
        print(f"vm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
