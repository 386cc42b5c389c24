"""The files of an ONNX model, wherever they are: a folder, one uncompressed .tar or .zip, or open descriptors by name.

An archive is read where it lies. Nothing is unpacked, so names are only names, nothing can grow beyond the file's own
size, and a model stays one file with one hash on its way through the appliance.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ai_assistant.errors import InvalidModel

MODEL = "model.onnx"
NEEDED = (MODEL, "tokenizer.json", "config.json")
OPTIONAL = (
    "tokenizer_config.json", "special_tokens_map.json", "sentence_bert_config.json", "modules.json",
    "1_Pooling/config.json",
)  # fmt: skip
MAX_MEMBERS = 4096
_MAX_DIRECTORY = 1 << 20
_MAX_NAME = 512
_HINT = "import the folder that holds model.onnx, tokenizer.json and config.json"


@dataclass(frozen=True, slots=True)
class Member:
    """Where a file's bytes are."""

    fd: int
    offset: int
    size: int
    stored: bool = True
    """False: compressed or encrypted, so that the bytes there are not the file's."""


class Package:
    """The files of one model by name; `model.onnx` is among them. Descriptors are not its own."""

    def __init__(self, members: Mapping[str, Member], size: int) -> None:
        if MODEL not in members:
            raise InvalidModel("there is no model.onnx in it", hint=_HINT)
        self.members = members
        self.size = size
        """Of all files, or of the archive, in bytes."""

    def read(self, name: str, limit: int) -> bytes | None:
        """A small file's content; None where there is none.

        Raises:
            InvalidModel: it is larger than `limit`, or cannot be read.
        """
        if name not in self.members:
            return None
        member = self.member(name)
        if member.size > limit:
            raise InvalidModel(f"{name} has {member.size} bytes, more than {limit}")
        return pread(member.fd, member.size, member.offset)

    def member(self, name: str) -> Member:
        """Raises InvalidModel: it is not there, or compressed."""
        found = self.members.get(name)
        if found is None:
            raise InvalidModel(f"there is no {name} beside model.onnx", hint=_HINT)
        if not found.stored:
            raise InvalidModel(
                f"{name} is compressed in the archive", hint="pack it without compression: zip -0, or tar"
            )
        return found


def pread(fd: int, size: int, offset: int) -> bytes:
    """Exactly that many bytes; raises InvalidModel."""
    parts: list[bytes] = []
    while size:
        try:
            part = os.pread(fd, min(size, 1 << 26), offset)
        except OSError as error:
            raise InvalidModel(f"the file cannot be read: {error.strerror}") from error
        if not part:
            raise InvalidModel(f"the file is truncated at byte {offset}")
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def package_of(fd: int, files: Mapping[str, int] | None = None) -> Package:
    """The model in an archive, or model.onnx itself together with the files that came with it.

    Raises:
        InvalidModel: it is neither, or damaged.
    """
    size = os.fstat(fd).st_size
    if is_archive(pread(fd, min(size, 512), 0)):
        return Package(_rooted(_members(fd, size)), size)
    members = {MODEL: Member(fd, 0, size)}
    for name in (*NEEDED[1:], *OPTIONAL):
        if files and name in files:
            members[name] = Member(files[name], 0, os.fstat(files[name]).st_size)
    if len(members) == 1:
        raise InvalidModel("an ONNX file alone has no tokenizer", hint=_HINT)
    return Package(members, sum(each.size for each in members.values()))


@contextmanager
def folder_package(folder: Path, model: Path | None = None) -> Iterator[Package]:
    """The model in a folder, as hubs have it: model.onnx may be in onnx/, everything else is at the top.

    Args:
        model: a file to take as model.onnx, whatever its name.

    Raises:
        InvalidModel: a file is missing, or none that can be read.
    """
    with contextlib.ExitStack() as stack:
        members: dict[str, Member] = {}
        for name, path in files_of(folder, model).items():
            try:
                file = stack.enter_context(open(path, "rb", opener=_plain))
            except OSError as error:
                raise InvalidModel(f"{path.name} cannot be opened: {error.strerror}") from error
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InvalidModel(f"{path.name} is not a regular file")
            members[name] = Member(file.fileno(), 0, status.st_size)
        yield Package(members, sum(each.size for each in members.values()))


def _plain(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)


def files_of(folder: Path, model: Path | None = None) -> dict[str, Path]:
    """The files of a model's folder by their names in a package; without model.onnx where it has none."""
    found = {name: folder / name for name in (*NEEDED, *OPTIONAL) if os.path.lexists(folder / name)}
    if model is not None:
        found[MODEL] = model
    if MODEL not in found and os.path.lexists(folder / "onnx" / MODEL):
        found[MODEL] = folder / "onnx" / MODEL
    for name in NEEDED if MODEL in found else ():
        if name not in found:
            raise InvalidModel(f"there is no {name} in the folder", hint=_HINT)
    return found


def pack(folder: Path) -> IO[bytes]:
    """A model's folder as one uncompressed archive, in a temporary file without a name.

    Raises:
        InvalidModel: the folder holds no ONNX model, or not all of it.
        OSError: no room for the copy.
    """
    with folder_package(folder) as package:
        # Not in /tmp, which may be memory.
        out = tempfile.TemporaryFile(dir=os.environ.get("TMPDIR", "/var/tmp"))  # noqa: S108, SIM115 - it is returned
        try:
            with tarfile.open(fileobj=out, mode="w:", format=tarfile.USTAR_FORMAT) as archive:
                for name, member in sorted(package.members.items()):
                    header = tarfile.TarInfo(name)
                    header.size = member.size
                    with os.fdopen(os.dup(member.fd), "rb") as content:
                        archive.addfile(header, content)
            out.flush()
        except BaseException:
            out.close()
            raise
    return out


def is_archive(head: bytes) -> bool:
    """Whether a file that begins so (512 bytes) is a .tar or a .zip."""
    return head[:4] == b"PK\x03\x04" or head[257:262] == b"ustar"


def holds_model(fd: int) -> bool:
    """Whether an archive has a model.onnx, so that it is worth saying what else is wrong with it."""
    try:
        return MODEL in _rooted(_members(fd, os.fstat(fd).st_size))
    except InvalidModel:
        # Cut or damaged; the names of the first files are in plain sight.
        return b".onnx" in pread(fd, min(_MAX_DIRECTORY, os.fstat(fd).st_size), 0)


def _members(fd: int, size: int) -> dict[str, Member]:
    head = pread(fd, 4, 0)
    return _zip(fd, size) if head == b"PK\x03\x04" else _tar(fd, size)


def _rooted(members: Mapping[str, Member]) -> dict[str, Member]:
    """Files by their names within a model: what all of them lie in does not count, nor does onnx/."""
    while len({name.partition("/")[0] for name in members}) == 1 and all("/" in name for name in members):
        members = {name.partition("/")[2]: each for name, each in members.items()}
    found = {name: members[name] for name in (*NEEDED, *OPTIONAL) if name in members}
    if MODEL not in found and "onnx/" + MODEL in members:
        found[MODEL] = members["onnx/" + MODEL]
    return found


def _tar(fd: int, size: int) -> dict[str, Member]:
    members: dict[str, Member] = {}
    at = blocks = 0
    while at + 512 <= size:
        header = pread(fd, 512, at)
        if not any(header):
            break
        blocks += 1
        if blocks > MAX_MEMBERS:
            raise InvalidModel(f"the archive has more than {MAX_MEMBERS} files")
        if header[257:262] != b"ustar" or not _summed(header):
            raise InvalidModel(f"the archive is damaged at byte {at}")
        length = _octal(header[124:136])
        begin = at + 512
        if begin + length > size:
            raise InvalidModel(f"the archive is truncated: a file ends at byte {begin + length}")
        kind = header[156:157]
        if kind in (b"0", b"\0", b"7"):
            # GNU's own format keeps times where POSIX has the first part of long names.
            prefix = header[345:500] if header[257:263] == b"ustar\0" else b""
            _put(members, b"/".join(each.split(b"\0")[0] for each in (prefix, header[:100]) if each.strip(b"\0")),
                 Member(fd, begin, length))  # fmt: skip
        elif kind in (b"L", b"S"):
            raise InvalidModel(
                "the archive has names or holes of GNU's own kind", hint="pack it with tar --format=ustar"
            )
        at = begin + -(-length // 512) * 512
    return members


def _summed(header: bytes) -> bool:
    return _octal(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * 32


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits.isdigit() or any(each in b"89" for each in digits):
        raise InvalidModel("the archive is damaged: a size in it is no number")
    return int(digits, 8)


def _zip(fd: int, size: int) -> dict[str, Member]:
    tail_at = max(0, size - 65_557)
    tail = pread(fd, size - tail_at, tail_at)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) - end < 22:
        raise InvalidModel("the archive is truncated: it has no directory")
    count, length, start = struct.unpack_from("<HII", tail, end + 10)
    if count == 0xFFFF or 0xFFFFFFFF in (length, start):
        raise InvalidModel("the archive is in the 64-bit form of zip", hint="pack it as .tar")
    if count > MAX_MEMBERS or length > _MAX_DIRECTORY:
        raise InvalidModel(f"the archive has more than {MAX_MEMBERS} files, or absurd names")
    if start + length > size:
        raise InvalidModel("the archive is truncated: its directory is not in it")
    directory = pread(fd, length, start)
    members: dict[str, Member] = {}
    at = 0
    for _ in range(count):
        if directory[at : at + 4] != b"PK\x01\x02" or at + 46 > length:
            raise InvalidModel("the archive's directory is damaged")
        flags, method = struct.unpack_from("<HH", directory, at + 8)
        packed, plain, name, extra, comment = struct.unpack_from("<IIHHH", directory, at + 20)
        (local,) = struct.unpack_from("<I", directory, at + 42)
        stored = method == 0 and not flags & 1 and packed == plain
        member = Member(fd, _zip_data(fd, size, local, packed), packed, stored)
        if not directory[at + 46 : at + 46 + name].endswith(b"/"):
            _put(members, directory[at + 46 : at + 46 + name], member)
        at += 46 + name + extra + comment
    return members


def _zip_data(fd: int, size: int, local: int, length: int) -> int:
    """Where a file's bytes begin, behind the second copy of its header."""
    header = pread(fd, 30, local) if local + 30 <= size else b""
    if header[:4] != b"PK\x03\x04":
        raise InvalidModel("the archive's directory points to no file")
    name, extra = struct.unpack_from("<HH", header, 26)
    begin = int(local + 30 + name + extra)
    if begin + length > size:
        raise InvalidModel(f"the archive is truncated: a file ends at byte {begin + length}")
    return begin


def _put(members: dict[str, Member], raw: bytes, member: Member) -> None:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise InvalidModel("the archive has a name that is not UTF-8") from None
    while name.startswith("./"):
        name = name[2:]
    if (
        not name
        or len(name) > _MAX_NAME
        or name.startswith("/")
        or ".." in name.split("/")
        or "\0" in name
        or "\\" in name
    ):
        raise InvalidModel(f"the archive has the impossible name {name[:80]!r}")
    if name in members:
        raise InvalidModel(f"the archive has {name[:80]!r} twice")
    members[name] = member
