"""A small world for the real daemon: a private system bus, the real polkitd, users and groups, and workers.

Everything runs in one private mount namespace (made by `enter`, re-entered by each command), where /etc/passwd,
/etc/group and polkit's folders are ours, so nothing of the host is touched.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
DATA = CHECKOUT / "daemon" / "data"
VAULT_DATA = CHECKOUT / "tee" / "data"
DAEMON_UID, WORKER_UID = 64000, 64010
USERS = {"member": 64001, "admin": 64002, "outsider": 64003}
"""A member of ai-assistant, a member of ai-assistant-admin, and somebody in neither."""
GROUPS = {"ai-assistant": (64000, ["member"]), "ai-assistant-admin": (64020, ["admin"])}
_POLICY = """<busconfig>
 <type>system</type>
 <listen>unix:path={socket}</listen>
 <auth>EXTERNAL</auth>
 <policy context="default">
  <allow user="*"/>
  <allow send_type="method_call"/><allow send_type="signal"/>
  <allow send_requested_reply="true" send_type="method_return"/>
  <allow send_requested_reply="true" send_type="error"/>
  <allow receive_type="method_call"/><allow receive_type="method_return"/>
  <allow receive_type="error"/><allow receive_type="signal"/>
  <allow send_destination="org.freedesktop.DBus"/>
 </policy>
 <includedir>{data}/usr/share/dbus-1/system.d</includedir>
 <includedir>{vault_data}/usr/share/dbus-1/system.d</includedir>
 <include ignore_missing="yes">/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf</include>
 {limits}
</busconfig>
"""


def missing() -> str:
    """Why this machine cannot host the world; empty if it can."""
    if os.geteuid() != 0:
        return "needs root, for users and mount namespaces"
    tools = ("dbus-daemon", "setpriv", "unshare", "busctl", "systemd-socket-activate")
    absent = [each for each in tools if shutil.which(each) is None]
    if not Path("/usr/lib/polkit-1/polkitd").exists():
        absent.append("polkitd")
    return f"not here: {', '.join(absent)}" if absent else ""


@dataclass
class World:
    """Paths and processes; `stop` ends everything."""

    directory: Path
    state_bytes: int = 0
    """Size of a file system of its own for the daemon's state; 0: none."""
    large_messages: bool = False
    """Let the bus pass what a stock one refuses (32 MiB), so that the daemon itself is tested."""
    daemon_arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    daemon: subprocess.Popen[bytes] | None = None
    workers: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"unix:path={self.directory}/bus"

    @property
    def api(self) -> Path:
        return self.directory / "run" / "api.sock"

    @property
    def log(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-20_000:]}"
            for path in sorted(self.directory.glob("*.log"))
            if path.stat().st_size
        )

    @property
    def state(self) -> Path:
        return self.directory / "state"

    def prepare(self) -> None:
        """Users, groups, polkit files and configuration."""
        directory = self.directory
        directory.chmod(0o755)
        for name in ("root", "run", "state", "etc", "actions", "rules"):
            (directory / name).mkdir(exist_ok=True)
        for name in ("proc", "sys"):
            (directory / "root" / name).symlink_to(f"/{name}")
        for name in ("run", "state"):
            os.chown(directory / name, DAEMON_UID, DAEMON_UID)
        users = [*((each.pw_name, each.pw_uid, each.pw_gid) for each in pwd.getpwall()), ("ai-assistant", 64000, 64000)]
        users += [(name, uid, uid) for name, uid in USERS.items()]
        (directory / "etc/passwd").write_text("".join(f"{n}:x:{u}:{g}::/:/bin/sh\n" for n, u, g in users))
        groups = [(each.gr_name, each.gr_gid, each.gr_mem) for each in grp.getgrall()]
        groups += [(name, gid, members) for name, (gid, members) in GROUPS.items()]
        groups += [(name, uid, []) for name, uid in USERS.items()]
        (directory / "etc/group").write_text("".join(f"{n}:x:{g}:{','.join(m)}\n" for n, g, m in groups))
        for source, target in (("actions", "actions"), ("rules.d", "rules")):
            for base in (Path("/"), DATA, VAULT_DATA):
                folder = base / "usr/share/polkit-1" / source
                for file in folder.glob("*"):
                    shutil.copy(file, directory / target / file.name)
        for each in (DATA / "usr/lib/ai-assistant").rglob("*.toml"):
            copy = directory / "root" / each.relative_to(DATA)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(each, copy)
        limits = ""
        if self.large_messages:
            limits = "".join(
                f'<limit name="{name}">134217728</limit>'
                for name in ("max_message_size", "max_incoming_bytes", "max_outgoing_bytes")
            )
        config = _POLICY.format(socket=directory / "bus", data=DATA, vault_data=VAULT_DATA, limits=limits)
        (directory / "bus.conf").write_text(config)

    def add_builtin(self, name: str, version: str, model: Path) -> None:
        """Make a file part of the image."""
        folder = self.directory / "root/usr/lib/ai-assistant/models" / name / version
        folder.mkdir(parents=True)
        shutil.copy(model, folder / "model.gguf")

    def worker_pids(self) -> list[int]:
        """The worker processes that run now."""
        assert self.workers is not None
        children = Path(f"/proc/{self.workers.pid}/task/{self.workers.pid}/children").read_text()
        alive = []
        for each in map(int, children.split()):
            with contextlib.suppress(OSError):
                if "\nState:\tZ" not in Path(f"/proc/{each}/status").read_text():
                    alive.append(each)
        return alive

    def configure(self, text: str) -> None:
        """Drop-in for the daemon's configuration; takes effect when it starts."""
        path = self.directory / "root/etc/ai-assistant/config.d/50-test.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def spawn(
        self, name: str, command: Sequence[str | Path], *, user: int = 0, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command in the world's namespace, its output in NAME.log."""
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "DBUS_SYSTEM_BUS_ADDRESS": self.address,
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            **(env or {}),
        }
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                self.inside(command, user=user),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd="/",
            )
        self.processes.append(process)
        return process

    def inside(self, command: Sequence[str | Path], *, user: int = 0) -> list[str]:
        """The command line that runs `command` with our users, as one of them."""
        binds = {
            "etc/passwd": "/etc/passwd",
            "etc/group": "/etc/group",
            "actions": "/usr/share/polkit-1/actions",
            "rules": "/usr/share/polkit-1/rules.d",
        }
        mounts = "".join(f"mount --bind {self.directory / ours} {theirs}; " for ours, theirs in binds.items())
        if self.state_bytes and user == DAEMON_UID:
            options = f"size={self.state_bytes},uid={user},gid={user}"
            mounts += f"mount -t tmpfs -o {options} tmpfs {self.state}; "
        drop: list[str] = []
        if user:
            identity = [f"--reuid={user}", f"--regid={user}", "--init-groups"]
            drop = ["setpriv", *identity, "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        script = f'set -e; {mounts}exec "$@"'
        head = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
        return [*head, *drop, *map(str, command)]

    def start_bus(self) -> None:
        self.spawn("bus", ["dbus-daemon", f"--config-file={self.directory}/bus.conf", "--nofork", "--nosyslog"])
        wait_for(lambda: (self.directory / "bus").exists(), "the bus")

    def start_polkit(self) -> None:
        """It is started again when it has died, as the system's bus does."""
        again = "while :; do /usr/lib/polkit-1/polkitd --no-debug & child=$!; wait $child; echo polkitd: $?; done"
        self.spawn("polkitd", ["sh", "-c", f"trap 'kill $child; wait $child; exit' TERM; {again}"])
        wait_for(lambda: self.owned("org.freedesktop.PolicyKit1"), "polkitd")

    def start_workers(self, engine: str) -> None:
        """A socket that starts the real worker for each connection, as its socket unit does."""
        path = self.directory / "run" / "worker.sock"
        command: list[str | Path] = ["systemd-socket-activate", "--accept", f"--listen={path}"]
        settings = {"PYTHONPATH": f"{CHECKOUT}:{engine}", "GOMP_SPINCOUNT": "3000", "PYTHONDONTWRITEBYTECODE": "1"}
        command += [f"--setenv={key}={value}" for key, value in settings.items()]
        # As MemoryDenyWriteExecute= in the unit: callbacks from native code must do without writable code.
        deny = "import ctypes, os, sys; ctypes.CDLL(None).prctl(65, 1, 0, 0, 0); os.execvp(sys.argv[1], sys.argv[1:])"
        command = [sys.executable, "-c", deny, *command, sys.executable, "-m", "ai_assistant.daemon.worker"]
        self.workers = self.spawn("worker", command, env=settings)
        wait_for(path.exists, "the worker socket")
        path.chmod(0o666)

    def start_fetch(self, libraries: str) -> None:
        """A socket that starts the real downloading process for each connection, as its socket unit does."""
        path = self.directory / "run" / "fetch.sock"
        settings = {"PYTHONPATH": f"{CHECKOUT}:{libraries}", "PYTHONDONTWRITEBYTECODE": "1"}
        command: list[str | Path] = ["systemd-socket-activate", "--accept", f"--listen={path}"]
        command += [f"--setenv={key}={value}" for key, value in settings.items()]
        self.spawn("fetch", [*command, sys.executable, "-m", "ai_assistant.daemon.fetch"], env=settings)
        wait_for(path.exists, "the fetch socket")
        path.chmod(0o666)

    def start_daemon(self) -> None:
        """Start it and wait until it says that it is ready."""
        command: list[str | Path] = [sys.executable, "-m", "ai_assistant.daemon", "--root", self.directory / "root"]
        command += ["--bus-address", self.address, "--api-socket", self.api, "--state-directory", self.state]
        workers = self.directory / "run" / "worker.sock"
        command += ["--worker-socket", workers, "--gpu-worker-socket", workers]
        command += ["--fetch-socket", self.directory / "run" / "fetch.sock", *self.daemon_arguments]
        seen = self._daemon_log().count("is ready")
        env = {"PYTHONPATH": str(CHECKOUT), "MALLOC_ARENA_MAX": "2", **self.environment}
        self.daemon = self.spawn("daemon", command, user=DAEMON_UID, env=env)
        wait_for(lambda: self._daemon_log().count("is ready") > seen, "the daemon", self.daemon)

    def start_vault(self, *arguments: str | Path, first: str = "") -> subprocess.Popen[bytes]:
        """The real vault, as root, with its files below `root`; it stays until `stop` unless the arguments say else.

        `first` is a piece of shell that runs before it in its namespace, to mount something.
        """
        command: list[str | Path] = [sys.executable, "-m", "ai_assistant.tee.vault", "--root", self.directory / "root"]
        env = {"PYTHONPATH": str(CHECKOUT)}
        command += ["--bus-address", self.address, "--idle", "600", *arguments]
        process = self.spawn("vault", ["sh", "-c", f'set -e; {first}\nexec "$@"', "sh", *command], env=env)
        wait_for(lambda: self.owned("org.ai_assistant1.Vault"), "the vault", process)
        return process

    def owned(self, name: str) -> bool:
        """Whether somebody has that name on the bus."""
        owned = ["busctl", f"--address={self.address}", "call", "org.freedesktop.DBus", "/org/freedesktop/DBus"]
        owned += ["org.freedesktop.DBus", "NameHasOwner", "s", name]
        return "true" in subprocess.run(owned, capture_output=True, text=True).stdout

    def vault(self, member: str, user: str = "root") -> str:
        """Call a method of the vault; standard output, or standard error if it failed."""
        name = "org.ai_assistant1.Vault"
        done = self.busctl("call", name, "/org/ai_assistant1/vault", name, member, user=user)
        return done.stdout if done.returncode == 0 else done.stderr

    def _daemon_log(self) -> str:
        path = self.directory / "daemon.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def stop_daemon(self, timeout_s: float = 30) -> int:
        """SIGTERM; the exit status."""
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGTERM)
        return self.daemon.wait(timeout_s)

    def state_files(self) -> list[str]:
        """What lies in the model folder as the daemon sees it, relative."""
        assert self.daemon is not None
        folder = Path(f"/proc/{self.daemon.pid}/root{self.state}/models")
        return sorted(str(each.relative_to(folder)) for each in folder.rglob("*"))

    @property
    def alive(self) -> bool:
        return self.daemon is not None and self.daemon.poll() is None

    def descriptors(self) -> int:
        """How many the daemon has open."""
        assert self.daemon is not None
        return len(list(Path(f"/proc/{self.daemon.pid}/fd").iterdir()))

    def memory(self, key: str = "VmRSS") -> int:
        """A line of the daemon's /proc/PID/status in bytes."""
        assert self.daemon is not None
        for line in Path(f"/proc/{self.daemon.pid}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
        raise KeyError(key)

    def wakeups(self, seconds: float) -> int:
        """Voluntary context switches of all the daemon's threads in that time."""
        assert self.daemon is not None

        def count() -> int:
            total = 0
            assert self.daemon is not None
            for task in Path(f"/proc/{self.daemon.pid}/task").iterdir():
                for line in (task / "status").read_text().splitlines():
                    if line.startswith("voluntary_ctxt_switches"):
                        total += int(line.split()[1])
            return total

        before = count()
        time.sleep(seconds)
        return count() - before

    def busctl(self, *arguments: str, user: str = "root", timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run busctl as one of the users."""
        command = ["busctl", f"--address={self.address}", f"--timeout={timeout_s:g}", *arguments]
        uid = USERS.get(user, 0)
        return subprocess.run(self.inside(command, user=uid), capture_output=True, text=True, timeout=timeout_s + 10)

    def call(self, member: str, *arguments: str, user: str = "root", path: str = "", interface: str = "Manager") -> str:
        """`busctl call` on one of our interfaces; standard output, or standard error if it failed."""
        where = path or "/org/ai_assistant1"
        done = self.busctl(
            "call", "org.ai_assistant1", where, f"org.ai_assistant1.{interface}", member, *arguments, user=user
        )
        return done.stdout if done.returncode == 0 else done.stderr

    def property(self, path: str, interface: str, name: str) -> object:
        """A property's value as JSON has it."""
        done = self.busctl(
            "--json=short", "get-property", "org.ai_assistant1", path, f"org.ai_assistant1.{interface}", name
        )
        assert done.returncode == 0, done.stderr
        value: object = json.loads(done.stdout)["data"]
        return value

    def stop(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            if process.poll() is None:
                process.kill()
                process.wait()


def wait_for(
    check: Callable[[], object], what: str, process: subprocess.Popen[bytes] | None = None, timeout_s: float = 30
) -> None:
    """Poll until `check` is true; fails when the process ends or the time is over."""
    deadline = time.monotonic() + timeout_s
    while not check():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"{what} ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come up in {timeout_s} s")
        time.sleep(0.05)


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """Under /tmp and readable for the world's users, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="ai-bus-") as name:
        yield Path(name)
