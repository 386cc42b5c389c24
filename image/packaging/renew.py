"""Write the lock: what the last builds took in, with the hashes of the archive's signed indexes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from image.packaging import apt
from image.packaging.drift import Installed, from_manifest, from_tree
from image.packaging.errors import PackagingError
from image.packaging.folder import cache
from image.packaging.lock import LOCK, Lock, Package, parse, write

CHECKOUT = Path(__file__).resolve().parent.parent.parent
TOOLBOX = CHECKOUT / "image/toolbox"
PROFILES = ("developer", "production", "test")


def manifests() -> list[Path]:
    """The manifests of the images of all profiles and of their initrds. Raises PackagingError, naming missing ones."""
    version = (CHECKOUT / "mkosi.version").read_text().strip()
    found, missing = [], []
    for profile in PROFILES:
        name = f"ai-assistant{'' if profile == 'developer' else '-' + profile}_{version}_x86-64"
        for path in (f"{name}.manifest", f"{name}.initrd.manifest"):
            file = CHECKOUT / "build/unsigned" / path
            found.append(file)
            if not file.exists():
                missing.append(path)
    if missing:
        raise PackagingError(
            f"not built yet, so what is in it is not known: {', '.join(missing)}",
            f"image/build PROFILE --unsigned for each of {', '.join(PROFILES)}, or make lock UPGRADE=1",
        )
    return found


def tools_tree() -> Path:
    done = subprocess.run([TOOLBOX, "--path"], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def together(parts: Mapping[str, Iterable[Installed]]) -> set[Installed]:
    """All packages of all parts. Raises PackagingError when two parts have a package in different versions."""
    found: dict[str, tuple[Installed, str]] = {}
    conflicts = []
    for part, packages in parts.items():
        for package in packages:
            other, where = found.setdefault(package.name, (package, part))
            if other != package:
                conflicts.append(f"{package.name} is {other.version} in {where}, {package.version} in {part}")
    if conflicts:
        more = f"\n  and {len(conflicts) - 10} more" if len(conflicts) > 10 else ""
        raise PackagingError(
            "one lock is for all, but the builds differ:\n  " + "\n  ".join(sorted(conflicts)[:10]) + more,
            "build all again: make lock UPGRADE=1",
        )
    return {package for package, _ in found.values()}


def read_index(text: str) -> dict[Installed, Package]:
    """What `apt-cache show` says, by package."""
    found: dict[Installed, Package] = {}
    for paragraph in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if not {"Package", "Version", "Architecture", "SHA256", "Size", "Filename"} <= fields.keys():
            continue
        package = Package(
            fields["Package"],
            fields["Version"],
            fields["Architecture"],
            fields["SHA256"],
            int(fields["Size"]),
            fields["Filename"],
        )
        installed = Installed(package.name, package.version, package.architecture)
        # The same package can be in the archive and in its security archive: either path does, the same one each time.
        found[installed] = min(package, found.get(installed, package), key=lambda each: each.path)
    return found


def ask_archive(names: Iterable[str]) -> dict[Installed, Package]:
    """Every version of these packages that the archive offers. apt checks the indexes' signatures."""
    folder = Path(tempfile.mkdtemp(prefix="ai-assistant-lock-", dir="/tmp"))
    try:
        apt.configure(folder, apt.archive_sources(), "", "archive")
        for each in ("state/lists/partial", "cache/archives/partial"):
            (folder / each).mkdir(parents=True)
        (folder / "status").touch()
        options = [
            *("-o", f"Dir::Etc={folder}/etc/apt"),
            *("-o", f"Dir::State={folder}/state"),
            *("-o", f"Dir::State::status={folder}/status"),
            *("-o", f"Dir::Cache={folder}/cache"),
            *("-o", "APT::Architecture=amd64"),
            *("-o", "APT::Sandbox::User=root"),
        ]
        update = subprocess.run(
            [TOOLBOX, "apt-get", *options, "-qq", "--error-on=any", "update"],
            capture_output=True,
            text=True,
            check=False,
        )
        if update.returncode:
            raise PackagingError(f"cannot read the archive's indexes: {update.stderr.strip()[-500:]}", "run it again")
        # The status of show is of no use: one unknown name fails it, after it has shown the others.
        shown = subprocess.run(
            [TOOLBOX, "apt-cache", *options, "show", "--all-versions", *sorted(names)],
            capture_output=True,
            text=True,
            check=False,
        )
        return read_index(shown.stdout)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def resolve(wanted: Iterable[Installed], known: Mapping[Installed, Package], old: Lock | None) -> list[Package]:
    """A lock's entry for each package: the archive's, or as locked before. Raises PackagingError for others."""
    before = {}
    if old is not None:
        before = {Installed(each.name, each.version, each.architecture): each for each in old.packages.values()}
    found, missing = [], []
    for each in sorted(wanted):
        package = known.get(each) or before.get(each)
        if package is None:
            missing.append(f"{each.name} {each.version}")
        else:
            found.append(package)
    if missing:
        raise PackagingError(
            f"the archive does not have {len(missing)} of what was built with: {', '.join(missing[:10])}",
            "build again: make lock UPGRADE=1",
        )
    return found


def rebuild() -> None:
    """Builds everything with the archive's newest packages, in trees and caches of its own."""
    environment = {**os.environ, "UPGRADE": "1"}
    for stale in (*cache().glob("toolbox-*-upgrade"), *cache().glob("mkosi-*-upgrade")):
        subprocess.run(["rm", "-rf", "--one-file-system", "--", stale], check=True)
    for profile in PROFILES:
        command = [str(CHECKOUT / "image/build"), profile, "--force", "--unsigned"]
        if subprocess.run(command, env=environment, check=False).returncode:
            raise PackagingError(f"cannot build the {profile} image with the newest packages")


def renew(path: Path = LOCK) -> Lock:
    """Writes the lock from what was built last."""
    tree = tools_tree()
    parts = {manifest.name: from_manifest(manifest) for manifest in manifests()}
    parts["the tools tree"] = from_tree(tree)
    wanted = together(parts)
    try:
        old = parse(path.read_text(encoding="ascii"), path.name)
    except (OSError, UnicodeDecodeError, PackagingError):
        old = None
    return write(resolve(wanted, ask_archive({each.name for each in wanted}), old), path)
