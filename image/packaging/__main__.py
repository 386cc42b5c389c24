"""image/packages: the lock of every Debian package that a build takes in, the folder that holds them, and drift."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from image.packaging import apt, drift, folder, lock, mirror, python, renew
from image.packaging.errors import PackagingError

LOCKED = os.environ.get("LOCKED") == "1"
# Building with what the archive has now, in order to lock that.
UPGRADE = os.environ.get("UPGRADE") == "1"


def on_apt(arguments: argparse.Namespace) -> None:
    if arguments.locked:
        held = lock.read()
        place = folder.default_folder()
        folder.index(place, held)
        apt.configure(arguments.tree, apt.locked_sources(place, held), apt.pins(held))
    else:
        preferences = apt.pins(lock.read()) if lock.LOCK.exists() and not UPGRADE else ""
        apt.configure(arguments.tree, apt.archive_sources(), preferences)


def on_options(arguments: argparse.Namespace) -> None:
    # mkosi shows its sandbox the folder of a local mirror, and no other; the sources are ours all the same.
    if arguments.locked:
        print(f"--local-mirror=file://{folder.default_folder()}")


def on_key(arguments: argparse.Namespace) -> None:
    if UPGRADE:
        print("upgrade")
    else:
        print((lock.read().key if lock.LOCK.exists() else "unlocked") + ("-locked" if arguments.locked else ""))


def on_repository(_: argparse.Namespace) -> None:
    held = lock.read()
    place = folder.default_folder()
    folder.index(place, held)
    print(place, held.suite)


def on_drift(arguments: argparse.Namespace) -> None:
    if UPGRADE or not (lock.LOCK.exists() or arguments.locked):
        return
    held = lock.read()
    trees = [*arguments.tree, *([renew.tools_tree()] if arguments.toolbox else [])]
    installed = set().union(*map(drift.from_manifest, arguments.manifest), *map(drift.from_tree, trees))
    found = list(drift.differences(installed, held))
    for line in found:
        print(f"drift: {line}", file=sys.stderr)
    if found and arguments.locked:
        raise PackagingError(f"{len(found)} packages are not as locked", "make lock, or build without LOCKED=1")


def on_lock(_: argparse.Namespace) -> None:
    if UPGRADE:
        renew.rebuild()
    held = renew.renew()
    print(f"{lock.LOCK.name}: {len(held.packages)} packages, {held.size >> 20} MiB")


def on_mirror(arguments: argparse.Namespace) -> None:
    place = arguments.folder.absolute() if arguments.folder else folder.default_folder()
    os.environ["AI_ASSISTANT_MIRROR"] = str(place)
    held = lock.read()
    requirements = python.all_requirements()
    if arguments.verify:
        mirror.check(place, held)
        python.check(place, requirements)
    else:
        bases = [line.split()[1] for line in apt.archive_sources().splitlines() if line.startswith("URIs: ")]
        seeds = [folder.cache() / "packages/cache/apt/archives"]
        place.mkdir(parents=True, exist_ok=True)
        fetched = mirror.Filler(place, bases, seeds).fill(held, mirror.say)
        mirror.say(f"{fetched} packages fetched")
        for each in requirements:
            mirror.say(f"{each.path.name}: {python.fetch(place, each)} files fetched")
    folder.index(place, held)
    mirror.say(
        f"{place} holds {len(held.packages)} packages, {held.size >> 20} MiB, and the Python artifacts, as locked"
    )


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="image/packages", description=__doc__)
    verbs = top.add_subparsers(required=True, metavar="COMMAND")

    def verb(name: str, run: object, text: str, locked: bool = True) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if locked:
            sub.add_argument("--locked", action="store_true", default=LOCKED, help="the mirror folder alone (LOCKED=1)")
        return sub

    verb("apt", on_apt, "write apt's configuration below a folder").add_argument("tree", type=Path)
    verb("mkosi-options", on_options, "print what mkosi needs besides that configuration")
    verb("key", on_key, "print a word that names the lock and the mode, for naming caches")
    verb("repository", on_repository, "index the mirror folder for the lock; print folder and suite", locked=False)
    sub = verb("drift", on_drift, "print what differs from the lock; with --locked that is an error")
    sub.add_argument("manifest", type=Path, nargs="*", help="manifests of mkosi")
    sub.add_argument("--toolbox", action="store_true", help="the tools tree")
    sub.add_argument("--tree", type=Path, action="append", default=[], help="any tree with dpkg's state")
    verb("lock", on_lock, "write the lock from the last builds (UPGRADE=1: build with the newest first)", locked=False)
    sub = verb("mirror", on_mirror, "fetch everything locked into a folder", locked=False)
    sub.add_argument("folder", type=Path, nargs="?", help="default: AI_ASSISTANT_MIRROR, or mirror/ in the cache")
    sub.add_argument("--verify", action="store_true", help="only check")
    return top


def main() -> int:
    arguments = parser().parse_args()
    try:
        arguments.run(arguments)
    except PackagingError as error:
        print(f"packages: {error}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"packages: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("packages: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
