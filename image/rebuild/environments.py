"""The two environments: A as it is, with warm caches; B as different as one machine can make it, with cold ones."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from image.rebuild.errors import RebuildError

SKEW_DAYS = 400
OWNER = 4711
# libfaketime is loaded by /etc/ld.so.preload, so no variable reaches it: mkosi hands on no environment. This library,
# which is initialised before it, sets them. File times stay true: libfaketime would change those that a build sets.
SETTINGS = """\
#include <stdlib.h>
__attribute__((constructor)) static void settings(void)
{
    setenv("NO_FAKE_STAT", "1", 1);
    setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1", 1);
    setenv("FAKETIME_DISABLE_SHM", "1", 1);
}
"""
LOCALE = "tr_TR.utf8"
LIBRARIES = "/usr/lib/x86_64-linux-gnu/faketime"


@dataclass
class Environment:
    """Where and how one of the two builds runs. `variables` are added to this process's, `umask` is its file mask."""

    name: str
    about: str
    folder: Path
    checkout: Path
    cache: Path
    variables: Mapping[str, str]
    umask: int = 0o022
    owner: int | None = None
    skewed: bool = False
    running: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def results(self) -> Path:
        return self.checkout / "build/unsigned"

    def run(self, command: Sequence[str | Path], log: Path, what: str) -> None:
        """Runs a command without any network, its words into `log`. Raises RebuildError with the last of them."""
        with log.open("ab") as out:
            self.running = subprocess.Popen(
                ["unshare", "--net", "--", *command],
                cwd=self.checkout,
                env={**os.environ, **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                umask=self.umask,
                start_new_session=True,
            )
            try:
                status = self.running.wait()
            except BaseException:
                self.stop()
                raise
        if status:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise RebuildError(f"{what} failed in {self.name}:\n{last}", f"see {log}")

    def stop(self) -> None:
        """Ends the command under way and everything that it started."""
        if self.running is None or self.running.poll() is not None:
            return
        for sign, patience_s in ((signal.SIGINT, 20), (signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            os.killpg(self.running.pid, sign)
            try:
                self.running.wait(patience_s)
                return
            except subprocess.TimeoutExpired:
                continue

    def clone(self, source: Path, commit: str) -> None:
        """The commit, and nothing else of `source`, as a checkout of its own."""
        shutil.rmtree(self.checkout, ignore_errors=True)
        self.checkout.parent.mkdir(parents=True, exist_ok=True)
        trust = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
        for command in (
            ["git", "clone", "--quiet", "--no-hardlinks", "--no-checkout", str(source), str(self.checkout)],
            ["git", "-C", str(self.checkout), "checkout", "--quiet", "--detach", commit],
        ):
            done = subprocess.run(
                command, env={**os.environ, **trust}, umask=self.umask, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RebuildError(f"cannot clone {commit[:12]}: {done.stderr.strip()[-300:]}", "is git installed?")
        if self.owner is not None:
            for root, folders, files in os.walk(self.checkout):
                for name in (".", *folders, *files):
                    os.chown(Path(root) / name, self.owner, self.owner, follow_symlinks=False)

    def skew(self, log: Path) -> None:
        """Sets the clock of the tools tree's programs ahead, wherever mkosi starts them, and makes their locale."""
        toolbox = self.checkout / "image/toolbox"
        sandbox = Path(self.variables["AI_ASSISTANT_SANDBOX_TREE"])
        sandbox.mkdir(exist_ok=True)
        self.run([toolbox, "--prepare"], log, "preparing the tools tree")
        tree = Path(self._ask([toolbox, "--path"]))
        if not (tree / "etc/faketimerc").exists():
            # A folder that the tools tree shows at the same path.
            source, library = (self.cache / "ai-assistant/tmp" / name for name in ("settings.c", "settings.so"))
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text(SETTINGS)
            self.run([toolbox, "gcc", "-shared", "-fPIC", "-O2", "-o", library, source], log, "compiling")
            shutil.copyfile(library, tree / f"{LIBRARIES[1:]}/settings.so")
            # The locale, which a tools tree has only the source of.
            made = library.with_name(LOCALE)
            self.run([toolbox, "localedef", "-i", "tr_TR", "-f", "UTF-8", made], log, "making a locale")
            shutil.copytree(made, tree / "usr/lib/locale" / LOCALE, dirs_exist_ok=True)
        for etc in (sandbox / "etc", tree / "etc"):
            etc.mkdir(parents=True, exist_ok=True)
            # The one listed last is initialised first.
            (etc / "ld.so.preload").write_text(f"{LIBRARIES}/libfaketime.so.1 {LIBRARIES}/settings.so\n")
            (etc / "faketimerc").write_text(f"+{SKEW_DAYS}d\n")
            for name in ("ld.so.preload", "faketimerc"):
                (etc / name).chmod(0o644)
        ahead = (int(self._ask([toolbox, "date", "+%s"])) - time.time()) / 86400
        if abs(ahead - SKEW_DAYS) > 1:
            raise RebuildError(f"the clock in the tools tree is {ahead:.1f} days ahead, not {SKEW_DAYS}")

    def _ask(self, command: Sequence[str | Path]) -> str:
        done = subprocess.run(
            command,
            cwd=self.checkout,
            env={**os.environ, **self.variables},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RebuildError(f"{command[0]} failed in {self.name}: {done.stderr.strip()[-300:]}")
        return done.stdout.strip()

    def build(self, profile: str, inputs: str, say: Callable[[str], None]) -> bool:
        """Builds one profile unless it has been built from the same inputs; returns whether it was built."""
        marker, log = self.folder / f"{profile}.built", self.folder / f"{profile}.log"
        if marker.exists() and marker.read_text() == inputs and any(self.results.glob("*.raw")):
            say(f"{self.name}: {profile} is there from the same inputs")
            return False
        marker.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        # What a killed build left.
        shutil.rmtree(self.checkout / "build/work", ignore_errors=True)
        started = time.monotonic()
        warm = self._warm(profile)
        say(f"{self.name}: building {profile} ({self.about})")
        build: list[str | Path] = [self.checkout / "image/build", profile, "--unsigned", "--force"]
        self.run(build, log, f"building {profile}")
        if self.name == "A" and not warm:
            say(f"{self.name}: building {profile} again, now that the caches are warm")
            self.run(build, log, f"building {profile}")
        marker.write_text(inputs)
        say(f"{self.name}: {profile} built in {time.monotonic() - started:.0f} s")
        return True

    def _warm(self, profile: str) -> bool:
        key = self._ask([self.checkout / "image/packages", "key"])
        folder = self.cache / f"ai-assistant/mkosi-{profile}-{key}"
        return any(folder.glob("root/*.cache"))


def both(folder: Path, mirror: Path, keys: Path) -> tuple[Environment, Environment]:
    """The two environments, in folders of their own. `mirror` and `keys` are what they share, besides the commit."""
    home_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    shared = {"LOCKED": "1", "AI_ASSISTANT_MIRROR": str(mirror), "AI_ASSISTANT_KEYS": str(keys)}
    a, b = folder / "a", folder / "b"
    other = {
        "XDG_CACHE_HOME": str(b / "cache"),
        "HOME": str(b / "home"),
        "USER": "rebuilder",
        "LOGNAME": "rebuilder",
        "TZ": "Pacific/Apia",
        "LANG": LOCALE,
        "LC_ALL": LOCALE,
        "AI_ASSISTANT_SANDBOX_TREE": str(b / "sandbox"),
    }
    return (
        Environment("A", "warm caches", a, a / "checkout", home_cache, {**shared, "XDG_CACHE_HOME": str(home_cache)}),
        Environment(
            "B",
            f"cold caches, another path, owner, user, locale, time zone and umask, {SKEW_DAYS} days ahead",
            b,
            b / "another/place/ai-assistant-os",
            b / "cache",
            {**shared, **other},
            umask=0o077,
            owner=OWNER,
            skewed=True,
        ),
    )
