"""Boot the built image in systemd-nspawn: three seconds to a running appliance, no virtual machine.

The image's own erofs root is the lower layer of an overlay on memory, so nothing of the image changes and
nothing stays. There is no verity, TPM or boot loader here; tests/vm has those. Run it in the tools tree,
in its private mount namespace:

    image/toolbox python3 -m image.container run|shell|exec [--image FILE] ...
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

CHECKOUT = Path(__file__).resolve().parent.parent
ROOMS = ("daemon", "hal", "models", "power", "provisioning", "tee")
PACKAGES = Path("/usr/lib/ai-assistant/python")
SOCKET_PATH_MAX = 107
QUESTION = "how much memory is free?"


class ContainerError(Exception):
    """The container cannot start or did not answer; the message is for a person."""


def image_path(profile: str = "developer") -> Path:
    """Where image/build puts the disk image of a profile."""
    version = (CHECKOUT / "mkosi.version").read_text().strip()
    infix = "" if profile == "developer" else f"-{profile}"
    return CHECKOUT / "build" / f"ai-assistant{infix}_{version}_x86-64.raw"


def partition_offset(image: Path, label: str) -> int:
    """Byte offset of the partition whose label starts with `label`."""
    table = json.loads(subprocess.run(["sfdisk", "-J", image], check=True, capture_output=True).stdout)[
        "partitiontable"
    ]
    for each in table["partitions"]:
        if each.get("name", "").startswith(label):
            return int(each["start"]) * int(table.get("sectorsize", 512))
    raise ContainerError(f"{image} has no partition {label}*")


class Container:
    """A booted appliance; a context manager. `sockets` is where the host finds its bus and its API socket."""

    def __init__(
        self,
        image: Path,
        *,
        sockets: Path | None = None,
        binds: Sequence[tuple[Path, Path]] = (),
        mount_checkout: bool = False,
        var_size: str = "",
    ) -> None:
        self.image = image.resolve()
        self.binds = list(binds)
        self.mount_checkout = mount_checkout
        self.var_size = var_size
        self.base = Path(tempfile.mkdtemp(prefix="appliance-", dir="/run"))
        self.root = self.base / "root"
        self.log = self.base / "console.log"
        self.sockets = sockets or Path(tempfile.mkdtemp(prefix="ai-assistant-", dir="/tmp"))
        self.leader = 0
        self.boot_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._cgroup: Path | None = None

    @property
    def api_socket(self) -> Path:
        return self.sockets / "ai-assistant" / "api.sock"

    @property
    def bus_address(self) -> str:
        return f"unix:path={self.sockets / 'dbus' / 'system_bus_socket'}"

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

    def _mount_root(self) -> None:
        if not self.image.exists():
            raise ContainerError(f"{self.image} does not exist: run make image")
        lower, changes = self.base / "lower", self.base / "changes"
        for folder in (lower, changes / "upper", changes / "work", self.root):
            folder.mkdir(parents=True)
        offset = partition_offset(self.image, "root_")
        _call("mount", "-t", "erofs", "-o", f"ro,loop,offset={offset}", self.image, lower)
        _call(
            "mount",
            "-t",
            "overlay",
            "overlay",
            "-o",
            f"lowerdir={lower},upperdir={changes}/upper,workdir={changes}/work",
            self.root,
        )
        # What the disk has and a container has not: its partitions.
        (self.root / "etc/fstab").write_text("")
        (self.root / "etc/crypttab").unlink(missing_ok=True)
        if self.var_size:
            state = self.root / "var/lib/ai-assistant"
            state.mkdir(parents=True, exist_ok=True)
        if self.mount_checkout:
            self.binds.append((CHECKOUT / "ai_assistant", PACKAGES / "ai_assistant"))
            self.binds += [(CHECKOUT / room, PACKAGES / room) for room in ROOMS]
        for _, target in self.binds:
            (self.root / target.relative_to("/")).mkdir(parents=True, exist_ok=True)

    def _enter_cgroup(self) -> None:
        """A cgroup of its own on a unified hierarchy: this host may have the old one mounted there."""
        hierarchy = Path("/sys/fs/cgroup")
        if not (hierarchy / "cgroup.procs").exists():
            _call("mount", "-t", "cgroup2", "cgroup2", hierarchy)
        self._cgroup = hierarchy / f"ai-assistant-{os.getpid()}-{self.base.name}"
        self._cgroup.mkdir()

    def start(self, timeout_s: float = 120.0) -> None:
        """Boot, and wait until the appliance says that it is up."""
        self._mount_root()
        self._enter_cgroup()
        for name in ("ai-assistant", "dbus"):
            (self.sockets / name).mkdir(parents=True, exist_ok=True)
            (self.sockets / name).chmod(0o755)
        self.sockets.chmod(0o755)
        if len(str(self.sockets / "dbus" / "system_bus_socket")) > SOCKET_PATH_MAX:
            raise ContainerError(f"{self.sockets} is too long for a socket's path; use a checkout nearer to /")
        command = [
            "systemd-nspawn",
            "--boot",
            "--quiet",
            "--register=no",
            "--keep-unit",
            "--console=pipe",
            "--private-network",
            "--notify-ready=yes",
            "--machine=ai-assistant",
            "--hostname=ai-assistant",
            f"--directory={self.root}",
            f"--bind={self.sockets}/ai-assistant:/run/ai-assistant",
            f"--bind={self.sockets}/dbus:/run/dbus",
            *(f"--bind-ro={source}:{target}" for source, target in self.binds),
        ]
        if self.var_size:
            command.append(f"--tmpfs=/var/lib/ai-assistant:size={self.var_size},mode=0755")
        notify = self.base / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, self.log.open("wb") as log:
            ready.bind(str(notify))
            ready.settimeout(0.5)
            started = time.monotonic()
            self._process = subprocess.Popen(
                [*command, "--", "systemd.show_status=yes"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"NOTIFY_SOCKET": str(notify)},
                # A new process joins the cgroup itself: later would be too late for nspawn.
                preexec_fn=lambda: _join(self._cgroup),
            )
            while True:
                if self._process.poll() is not None:
                    raise ContainerError(f"systemd-nspawn ended with {self._process.returncode}\n{self.console()}")
                if time.monotonic() - started > timeout_s:
                    raise ContainerError(f"the appliance is not up after {timeout_s:.0f} s\n{self.console()}")
                with contextlib.suppress(TimeoutError):
                    message = ready.recv(65536).decode(errors="replace").splitlines()
                    for line in message:
                        if line.startswith("X_NSPAWN_LEADER_PID="):
                            self.leader = int(line.partition("=")[2])
                    if "READY=1" in message and self.leader:
                        break
            self.boot_s = time.monotonic() - started

    def command(self, *arguments: str, user: str = "root") -> list[str]:
        """The host command that runs `arguments` inside."""
        inside = list(arguments) if user == "root" else ["runuser", "-u", user, "--", *arguments]
        return [
            "nsenter",
            f"--target={self.leader}",
            "--all",
            "env",
            "-i",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME=/root",
            "LANG=C.UTF-8",
            f"TERM={os.environ.get('TERM', 'dumb')}",
            *inside,
        ]

    def run(
        self,
        *arguments: str,
        user: str = "root",
        check: bool = True,
        timeout_s: float = 120.0,
        stdin: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside and return what it printed; its failure is a ContainerError with its output."""
        done = subprocess.run(
            self.command(*arguments, user=user),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            input=stdin,
            check=False,
        )
        if check and done.returncode != 0:
            raise ContainerError(f"{shlex.join(arguments)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def console(self) -> str:
        return self.log.read_text(errors="replace")[-8000:] if self.log.exists() else ""

    def stop(self) -> None:
        """Shut down cleanly, then make sure; idempotent."""
        if self._process is not None and self._process.poll() is None:
            if self.leader:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.leader, signal.SIGRTMIN + 4)  # systemd: power off
            try:
                self._process.wait(30 if self.leader else 1)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)
        self._process = None
        for mounted in (self.root, self.base / "lower"):
            subprocess.run(["umount", "-R", "-l", mounted], check=False, stderr=subprocess.DEVNULL)
        if self._cgroup is not None and self._cgroup.exists():
            for folder in sorted(self._cgroup.rglob("*/"), key=lambda each: -len(each.parts)):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            with contextlib.suppress(OSError):
                self._cgroup.rmdir()
            self._cgroup = None
        shutil.rmtree(self.base, ignore_errors=True)
        shutil.rmtree(self.sockets, ignore_errors=True)


def _join(cgroup: Path | None) -> None:
    if cgroup is not None:
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))


def _call(*arguments: str | Path) -> None:
    done = subprocess.run([str(each) for each in arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ContainerError(f"{shlex.join(map(str, arguments))}: {done.stderr.strip()}")


@contextlib.contextmanager
def _sockets() -> Iterator[Path]:
    """build/run, replaced if an earlier run was killed; somewhere shorter if the checkout lies too deep."""
    folder = CHECKOUT / "build" / "run"
    if len(str(folder)) > SOCKET_PATH_MAX - 30:
        folder = Path(tempfile.mkdtemp(prefix="ai-assistant-", dir="/tmp"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="container", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=("run", "shell", "exec"))
    parser.add_argument("--image", type=Path, default=image_path())
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("command", nargs="*", help="for exec: what to run inside")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminate)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        with (
            _sockets() as sockets,
            Container(arguments.image, sockets=sockets, mount_checkout=arguments.action == "shell") as box,
        ):
            if arguments.action == "exec":
                return subprocess.run(box.command(*arguments.command), check=False).returncode
            print(f"The appliance is up after {box.boot_s:.1f} s.", flush=True)
            if arguments.action == "shell":
                print("Its Python is this checkout; after an edit: systemctl restart ai-assistantd", flush=True)
                return subprocess.run(box.command("bash", "--login"), check=False).returncode
            return _run(box, arguments.question, interactive)
    except ContainerError as error:
        print(f"container: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(box: Container, question: str, interactive: bool) -> int:
    print(f"\n> {question}", flush=True)
    answered = subprocess.run(box.command("ai-assistant", "ask", question), check=False, stdin=subprocess.DEVNULL)
    if answered.returncode != 0:
        print(box.run("journalctl", "--no-pager", "-n", "40", check=False).stdout, file=sys.stderr)
        return answered.returncode
    print(
        f"\nFrom this machine, while it runs:\n"
        f"  curl --unix-socket {box.api_socket} http://localhost/v1/models\n"
        f"  busctl --address={box.bus_address} tree org.ai_assistant1",
        flush=True,
    )
    if not interactive:
        return 0
    print("\nAsk it something, in English or Chinese; Ctrl-D ends.", flush=True)
    subprocess.run(box.command("ai-assistant", "ask"), check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
