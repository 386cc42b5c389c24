"""Build the committed state twice, in two environments without a network, and compare every byte.

Exit status: 0 identical, 1 different or not possible, 2 wrong usage, 130 interrupted (run it again to go on).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from image.rebuild.compare import Comparison, compare_builds, table
from image.rebuild.environments import Environment, both
from image.rebuild.errors import RebuildError
from image.rebuild.show import show

CHECKOUT = Path(__file__).resolve().parent.parent.parent
PROFILES = ("developer", "production", "test")
# Trees, caches and images of both, with room to spare: 4 GB at first, and 4 GB for each profile and side.
FREE_FIRST, FREE_EACH = 6 << 30, 8 << 30


def say(line: str) -> None:
    print(f"reproduce: {line}", file=sys.stderr, flush=True)


def ask(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode:
        message, _, hint = done.stderr.strip().partition("\n  hint: ")
        raise RebuildError(message[-500:] or f"{command[0]} failed", hint)
    return done.stdout.strip()


def inputs(commit: str, keys: Path) -> str:
    """Names what goes into a build besides its environment: the commit, locks with it, and the public keys."""
    digest = hashlib.sha256(commit.encode())
    for name in ("secure-boot.crt", "pcr.pub", "release.pub"):
        try:
            digest.update((keys / name).read_bytes())
        except OSError as error:
            raise RebuildError(f"no public key {keys / name}: {error.strerror}", "make keys") from error
    return digest.hexdigest()


def room(folder: Path, profiles: int) -> None:
    """Raises RebuildError when the disk has too little room."""
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = FREE_FIRST + profiles * FREE_EACH, shutil.disk_usage(folder).free
    # What an earlier run left counts: it is replaced, or not made again.
    used = sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
    if free + used < needed:
        raise RebuildError(
            f"{folder} has {free >> 30} GiB free, {needed >> 30} GiB are needed",
            "free some, or AI_ASSISTANT_REPRODUCE=FOLDER on another disk",
        )


def prepare(environment: Environment, commit: str, key: str, again: bool) -> None:
    """A checkout of the commit; and for B caches without anything in them, unless this very run was interrupted."""
    marker = environment.folder / "inputs"
    if not again and marker.exists() and marker.read_text() == key and environment.checkout.is_dir():
        return
    # A tools tree in it is read-only only while something runs.
    shutil.rmtree(environment.folder, ignore_errors=True)
    environment.folder.mkdir(parents=True)
    # mkosi and apt drop privileges in places, so the folders on the way must not be closed by the umask.
    for name in ("cache", "home"):
        (environment.folder / name).mkdir()
    environment.clone(CHECKOUT, commit)
    marker.write_text(key)


def reproduce(profiles: list[str], again: bool) -> list[Comparison]:
    if os.geteuid() != 0:
        raise RebuildError(
            "must run as root: it mounts file systems and makes a network namespace", "sudo make reproduce"
        )
    commit = ask("git", "-c", "safe.directory=*", "rev-parse", "HEAD")
    if ask("git", "-c", "safe.directory=*", "status", "--porcelain", "--untracked-files=no"):
        say(f"what is not committed is not built; the commit is {commit[:12]}")
    mirror, _ = ask("image/packages", "repository").rsplit(" ", 1)
    keys = Path(ask("image/keys", "--path"))
    key = inputs(commit, keys)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "ai-assistant"
    folder = Path(os.environ.get("AI_ASSISTANT_REPRODUCE") or cache / "reproduce").absolute()
    room(folder, len(profiles))
    environments = both(folder, Path(mirror), keys)
    for environment in environments:
        prepare(environment, commit, key, again)
        if environment.skewed:
            environment.skew(environment.folder / "prepare.log")
        for profile in profiles:
            environment.build(profile, key, say)
    a, b = environments
    version = (a.checkout / "mkosi.version").read_text().strip()
    found = []
    for profile in profiles:
        name = f"ai-assistant{'' if profile == 'developer' else '-' + profile}_{version}_x86-64"
        say(f"comparing {name}")
        comparison = compare_builds(name, a.results, b.results)
        found.append(comparison)
        if not comparison.identical:
            for line in show(comparison, a.results, b.results, folder / "show"):
                print(f"  {line}", file=sys.stderr)
    return found


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="image/reproduce", description=__doc__)
    top.add_argument("profile", nargs="*", metavar="PROFILE", help="default: developer production")
    top.add_argument("--json", action="store_true", help="print the result as JSON")
    top.add_argument("--again", action="store_true", help="build both again, whatever is there")
    return top


def main() -> int:
    top = parser()
    arguments = top.parse_args()
    for profile in arguments.profile:
        if profile not in PROFILES:
            top.error(f"no profile {profile!r}: {', '.join(PROFILES)}")
    try:
        found = reproduce(arguments.profile or ["developer", "production"], arguments.again)
    except RebuildError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("reproduce: interrupted; run it again to go on", file=sys.stderr)
        return 130
    identical = all(comparison.identical for comparison in found)
    if arguments.json:
        print(json.dumps({"identical": identical, "images": [each.as_json() for each in found]}, indent=2))
    else:
        for comparison in found:
            print(table(comparison))
        print("identical" if identical else "differs")
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
