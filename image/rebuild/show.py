"""Show what differs: which files of which partition, and in what, with a limit on how much is said."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from image.rebuild.compare import Comparison, label
from image.rebuild.disk import Partition, partitions

TOOLBOX = Path(__file__).resolve().parent.parent / "toolbox"
MOST_FILES = 40
DIFFED_FILES = 6
REPORT_BYTES = 12_000
PATIENCE_S = 300


def tools(*command: str | Path, patience_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["timeout", str(patience_s), TOOLBOX, *command],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def extract(image: Path, partition: Partition, target: Path) -> str:
    """Unpacks a FAT or erofs partition; returns what hindered it."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    if partition.kind == "esp":
        done = tools("mcopy", "-s", "-p", "-m", "-Q", "-n", "-i", f"{image}@@{partition.start}", "::*", target)
    else:
        cut = target.with_name(f"{target.name}.partition")
        tools(
            *("dd", f"if={image}", f"of={cut}", "bs=1M", "iflag=skip_bytes,count_bytes", "conv=sparse"),
            *(f"skip={partition.start}", f"count={partition.size}"),
        )
        done = tools("fsck.erofs", f"--extract={target}", "--overwrite", "--preserve", cut)
        cut.unlink(missing_ok=True)
    return done.stderr.strip()[-300:] if done.returncode else ""


def sections(unified: Path, target: Path) -> None:
    """Unpacks the sections of a unified kernel image into files."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    headers = tools("objdump", "--section-headers", unified).stdout
    for line in headers.splitlines():
        words = line.split()
        if len(words) > 2 and words[0].isdigit() and words[1].startswith("."):
            name = words[1]
            file = target / name.lstrip(".")
            tools("objcopy", "-O", "binary", f"--only-section={name}", unified, file)
            if file.exists():
                os.utime(file, (0, 0))
            if name == ".initrd":
                # Archives one after the other, the first compressed: what follows it is seen by the section alone.
                unpacked = target / "initrd.files"
                unpacked.mkdir()
                unpack = 'zstd -dcq "$1" 2>/dev/null | cpio --extract --make-directories --quiet --directory "$2"'
                tools("bash", "-c", unpack, "unpack", file, unpacked)


def describe(path: Path) -> tuple[str, ...]:
    """What counts of a file: kind and mode, owner, time, target or content."""
    status = path.lstat()
    content = ""
    if stat.S_ISLNK(status.st_mode):
        content = str(path.readlink())
    elif stat.S_ISREG(status.st_mode):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    return stat.filemode(status.st_mode), f"{status.st_uid}:{status.st_gid}", str(int(status.st_mtime)), content


def trees(a: Path, b: Path) -> Iterator[tuple[str, str]]:
    """Path and a word or two about each file that two folders do not have alike."""
    names = sorted({path.relative_to(root).as_posix() for root in (a, b) for path in root.rglob("*")})
    for name in names:
        left, right = a / name, b / name
        if not os.path.lexists(left) or not os.path.lexists(right):
            yield name, f"only in {'B' if os.path.lexists(right) else 'A'}"
            continue
        kinds = ("mode", "owner", "time", "content")
        pairs = zip(kinds, describe(left), describe(right), strict=True)
        words = [f"{kind} {x} / {y}" if kind != "content" else kind for kind, x, y in pairs if x != y]
        if words:
            yield name, ", ".join(words)


def folders(what: str, a: Path, b: Path) -> Iterator[str]:
    """Which files of two folders differ, and how the content of the first few does."""
    found = list(trees(a, b))
    yield f"{what}: {len(found)} files differ" if found else f"{what}: the files are alike, the file system differs"
    for name, words in found[:MOST_FILES]:
        yield f"  {name}: {words}"
    if len(found) > MOST_FILES:
        yield f"  … and {len(found) - MOST_FILES} more"
    for name, words in [each for each in found if each[1].endswith("content")][:DIFFED_FILES]:
        if (a / name).is_file() and words:
            yield from diffoscope(a / name, b / name)


def diffoscope(a: Path, b: Path) -> Iterator[str]:
    done = tools(
        *("diffoscope", "--no-progress", "--exclude-directory-metadata=yes", "--max-text-report-size"),
        *(str(REPORT_BYTES), "--text", "-", "--text-color=never", a, b),
    )
    text = done.stdout.strip() or done.stderr.strip()[-500:] or "diffoscope found no words for it"
    yield from text[: 2 * REPORT_BYTES].splitlines()


def show(comparison: Comparison, a: Path, b: Path, work: Path) -> Iterator[str]:
    """Lines about everything that differs. `work` is a folder for what is unpacked; it goes again."""
    try:
        differing = {pair.what for pair in (*comparison.artefacts, *comparison.parts) if not pair.identical}
        for suffix in ("initrd.manifest", "manifest"):
            if suffix in differing:
                yield from diffoscope(a / f"{comparison.name}.{suffix}", b / f"{comparison.name}.{suffix}")
        if "efi" in differing:
            for side, folder in (("a", a), ("b", b)):
                sections(folder / f"{comparison.name}.efi", work / side / "efi")
            yield from folders("sections of the unified kernel image", work / "a/efi", work / "b/efi")
        images = (a / f"{comparison.name}.raw", b / f"{comparison.name}.raw")
        for left, right in zip(partitions(images[0]), partitions(images[1]), strict=False):
            if label(left) not in differing or left.kind == "root-verity":
                continue
            what = f"partition {label(left)}"
            hindered = [
                extract(image, each, work / side / "tree")
                for side, image, each in (("a", images[0], left), ("b", images[1], right))
            ]
            if any(hindered):
                yield f"{what}: cannot be unpacked: {' / '.join(filter(None, hindered))}"
            else:
                yield from folders(what, work / "a/tree", work / "b/tree")
    finally:
        shutil.rmtree(work, ignore_errors=True)
