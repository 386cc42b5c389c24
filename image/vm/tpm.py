"""A software TPM that is kept per machine, and what can happen to one."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from image.vm.process import VMError, finish, spawn, wait_for_path

INDEX = "0x1500016"


class SoftwareTPM:
    """swtpm with its state in a folder: it survives cold boots and is copied with the machine."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "tpm"
        self.socket = folder / "tpm.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self._log = (folder / "tpm.log").open("ab")
        self.state.mkdir(exist_ok=True)

    def start(self) -> None:
        """For QEMU, which powers it on and off through its control socket."""
        self._start(self.socket, "--flags=startup-clear")

    def _start(self, control: Path, *options: str) -> None:
        self.stop()
        command = ["swtpm", "socket", "--tpm2", f"--tpmstate=dir={self.state}", f"--ctrl=type=unixio,path={control}"]
        self._process = spawn([*command, *options], output=self._log)
        wait_for_path(control, self._process)

    def stop(self) -> None:
        if self._process is not None:
            finish(self._process)
        self._process = None
        self.socket.unlink(missing_ok=True)

    def copy_to(self, folder: Path) -> None:
        shutil.copytree(self.state, folder / "tpm", dirs_exist_ok=True)

    def replace(self) -> None:
        """Another TPM, as after a new mainboard."""
        shutil.rmtree(self.state)
        self.state.mkdir()

    def clear(self) -> None:
        """As the firmware's menu does: the owner's seed is made anew, so nothing sealed opens again."""
        with self.tools() as run:
            run("tpm2_clear", "-c", "platform")

    def lock_out(self) -> None:
        """As after too many wrong guesses: nothing that is protected against guessing works for a day."""
        with self.tools() as run:
            run("tpm2_dictionarylockout", "--setup-parameters", "--max-tries=1", "--recovery-time=86400")
            run("tpm2_nvdefine", "-Q", "-C", "o", "-s", "8", "-a", "authread|authwrite", "-p", "right", INDEX)
            for _ in range(2):
                with contextlib.suppress(VMError):
                    run("tpm2_nvread", "-C", INDEX, "-P", "wrong", "-s", "8", INDEX)
            run("tpm2_nvundefine", "-Q", "-C", "o", INDEX)
            state = run("tpm2_getcap", "properties-variable")
            if not any("inLockout" in line and line.strip().endswith("1") for line in state.splitlines()):
                raise VMError(f"the TPM did not lock itself\n{state}")

    @contextlib.contextmanager
    def tools(self) -> Iterator[Tools]:
        """The TPM alone, without a machine, for tpm2-tools."""
        server = self.state.parent / "tpm-server.sock"
        control = server.with_name(f"{server.name}.ctrl")  # where tpm2-tools look for it
        self._start(control, "--flags=not-need-init", f"--server=type=unixio,path={server}")
        try:
            wait_for_path(server, self._running)
            tools = Tools(server)
            tools("tpm2_startup", "-c")
            yield tools
            tools("tpm2_shutdown", "-c")
        finally:
            self.stop()
            server.unlink(missing_ok=True)
            control.unlink(missing_ok=True)

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process


class Tools:
    """tpm2-tools against one swtpm."""

    def __init__(self, server: Path) -> None:
        self._environment = {**os.environ, "TPM2TOOLS_TCTI": f"swtpm:path={server}"}

    def __call__(self, *command: str) -> str:
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise VMError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
        return done.stdout
