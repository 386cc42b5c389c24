"""Reads and checks the header of a GGUF file without numpy, native code or trust.

A model file is hostile input, and llama.cpp answers some malformed ones with `abort()`. So everything
that it would assert on is checked here first. Only the header is read (with `pread`, in bounded
amounts), whatever the file claims of itself: an empty file, a truncated one, a sparse one of 100 GB
and one with 2⁶³ tensors all fail within milliseconds. Every failure is `InvalidModel` with the reason.

Source of the format: llama.cpp's gguf.cpp at the version pinned in `requirements/engine.txt`.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ai_assistant.engines.ggml_types import FILE_TYPES, GGML_TYPES, GgmlType
from ai_assistant.errors import InvalidModel

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 256 << 20
"""Everything before the weights. The largest tokenizers in use need about 25 MB."""
MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_STRING_BYTES = 4 << 20
MAX_STRINGS = 4_000_000
"""Over all arrays. 262,144 tokens and 514,906 merges are the most that a known model has."""
MAX_KEPT_ARRAY = 4096
"""Longer arrays of numbers are counted, not kept."""
MAX_NAME_BYTES = 63
"""ggml keeps tensor names in 64 bytes, with the terminator."""
_CHUNK = 1 << 20

_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"),
    4: struct.Struct("<I"), 5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<?"),
    10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d"),
}  # fmt: skip
_INTEGERS = frozenset({0, 1, 2, 3, 4, 5, 10, 11})
_STRING, _ARRAY = 8, 9
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True, slots=True)
class Array:
    """An array value: its element type as a GGUF number, its length, and the values if they were kept."""

    type: int
    count: int
    values: tuple[Any, ...] | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    """ggml order: the first dimension is the contiguous one."""
    type: GgmlType
    offset: int
    """Bytes from the start of the data section."""
    elements: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Gguf:
    """The checked header of one file."""

    version: int
    size_bytes: int
    """Of the whole file."""
    data_offset: int
    alignment: int
    metadata: Mapping[str, Any]
    """Scalars and strings as Python values, arrays as `Array`."""
    tensors: Mapping[str, Tensor]
    tokens: tuple[int, int] = (0, 0)
    """Number of tokens in the tokenizer, and length in bytes of the longest."""
    special_tokens: Mapping[int, str] = field(default_factory=dict)
    """Text of the tokens that `tokenizer.ggml.*_token_id` names."""

    @property
    def parameters(self) -> int:
        return sum(each.elements for each in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        return sum(each.size_bytes for each in self.tensors.values())

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def chat_template(self) -> str:
        found = self.metadata.get("tokenizer.chat_template", "")
        return found if isinstance(found, str) else ""

    @property
    def quantization(self) -> str:
        """As `general.file_type` has it, otherwise the type that holds most of the weights."""
        label = FILE_TYPES.get(self.integer("general.file_type", -1))
        if label:
            return label
        sizes: dict[str, int] = {}
        for each in self.tensors.values():
            sizes[each.type.name] = sizes.get(each.type.name, 0) + each.size_bytes
        return max(sizes, key=lambda name: sizes[name]) if sizes else "unknown"

    def integer(self, key: str, default: int) -> int:
        value = self.metadata.get(key, default)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def of_model(self, key: str) -> Any:
        """The value of an architecture's own key, as in `llama.block_count`; None if it is not there."""
        return self.metadata.get(f"{self.architecture}.{key}")


class _Cursor:
    """A forward reader over a descriptor: never seeks it, never holds more than one value and a chunk."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._limit = min(size, MAX_HEADER_BYTES)
        self._size = size
        self._base = 0
        self._buffer = b""
        self._at = 0

    @property
    def offset(self) -> int:
        return self._base + self._at

    def need(self, count: int) -> tuple[bytes, int]:
        """The buffer and the place in it where `count` bytes begin; the cursor moves behind them."""
        at = self._at
        if at + count > len(self._buffer):
            self._fill(count)
            at = 0
        self._at = at + count
        return self._buffer, at

    def _fill(self, count: int) -> None:
        start = self.offset
        if start + count > self._limit:
            if start + count > self._size:
                raise InvalidModel(f"the file is truncated: its header goes on at byte {start}, the file does not")
            raise InvalidModel(f"the header is larger than {MAX_HEADER_BYTES >> 20} MiB")
        wanted = min(max(count, _CHUNK), self._limit - start)
        try:
            data = os.pread(self._fd, wanted, start)
        except OSError as error:
            raise InvalidModel(f"the file cannot be read: {error.strerror}") from error
        if len(data) < count:
            raise InvalidModel(f"the file is truncated at byte {start + len(data)}")
        self._base, self._buffer, self._at = start, data, 0

    def skip(self, count: int) -> None:
        at = self._at + count
        if at > len(self._buffer):
            start = self._base + at
            if start > self._limit:
                raise InvalidModel(f"the file is truncated: a value ends at byte {start}, beyond the header's limit")
            self._base, self._buffer, self._at = start, b"", 0
        else:
            self._at = at

    def u32(self) -> int:
        buffer, at = self.need(4)
        return int(_U32.unpack_from(buffer, at)[0])

    def u64(self) -> int:
        buffer, at = self.need(8)
        return int(_U64.unpack_from(buffer, at)[0])

    def scalar(self, kind: int) -> Any:
        layout = _SCALARS[kind]
        buffer, at = self.need(layout.size)
        return layout.unpack_from(buffer, at)[0]

    def raw_string(self, what: str, limit: int = MAX_STRING_BYTES) -> bytes:
        length = self.u64()
        if length > limit:
            raise InvalidModel(f"{what} is {length} bytes long, more than {limit}")
        buffer, at = self.need(length)
        return buffer[at : at + length]

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        raw = self.raw_string(what, limit)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise InvalidModel(f"{what} is not UTF-8") from None


@contextmanager
def opened(path_or_fd: int | str | os.PathLike[str]) -> Iterator[int]:
    """A descriptor of a regular file for reading; one that was passed in stays open and unmoved.

    Raises:
        InvalidModel: it does not exist, cannot be read, or is no regular file.
    """
    own = not isinstance(path_or_fd, int)
    fd = -1
    try:
        if isinstance(path_or_fd, int):
            fd = path_or_fd
        else:
            # O_NONBLOCK: opening a FIFO must not wait for a writer.
            fd = os.open(path_or_fd, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        mode = os.fstat(fd).st_mode
    except (OSError, ValueError) as error:
        if own and fd >= 0:
            os.close(fd)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidModel(f"the model file cannot be opened: {reason}") from error
    try:
        if not stat.S_ISREG(mode):
            raise InvalidModel("the model is not a regular file")
        yield fd
    finally:
        if own:
            os.close(fd)


def read_gguf(path_or_fd: int | str | os.PathLike[str]) -> Gguf:
    """Parse and check a file's structure; `gguf_rules.check` then judges whether the engine can run it.

    Raises:
        InvalidModel: naming the reason.
    """
    with opened(path_or_fd) as fd:
        size = os.fstat(fd).st_size
        if size == 0:
            raise InvalidModel("the file is empty")
        return _Parser(fd, size).parse()


class _Parser:
    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        self.cursor = _Cursor(fd, size)
        self.metadata: dict[str, Any] = {}
        self.strings = 0
        self.tokens: list[bytes] = []

    def parse(self) -> Gguf:
        if self.size < 24:
            raise InvalidModel(f"the file is truncated: {self.size} bytes cannot hold a GGUF header")
        buffer, at = self.cursor.need(4)
        if buffer[at : at + 4] != MAGIC:
            raise InvalidModel("the file is not GGUF: its first four bytes are wrong")
        version = self.cursor.u32()
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3)
            reason = "it is big-endian" if swapped else f"its version is {version}, not 2 or 3"
            raise InvalidModel(f"this GGUF file is not supported: {reason}")
        tensor_count, key_count = self.cursor.u64(), self.cursor.u64()
        # A key takes at least 13 bytes and a tensor 25, so a small file cannot have many of either.
        if key_count > MAX_KEYS or key_count * 13 > self.size:
            raise InvalidModel(f"the header claims {key_count} keys, which is absurd for {self.size} bytes")
        if tensor_count > MAX_TENSORS or tensor_count * 25 > self.size:
            raise InvalidModel(f"the header claims {tensor_count} tensors, which is absurd for {self.size} bytes")
        if tensor_count == 0:
            raise InvalidModel("the file has no tensors")
        for _ in range(key_count):
            self._key()
        alignment = self._alignment()
        tensors = self._tensors(tensor_count, alignment)
        start = -(-self.cursor.offset // alignment) * alignment
        for each in tensors.values():
            if start + each.offset + each.size_bytes > self.size:
                raise InvalidModel(f"the file is truncated: tensor {each.name!r} ends beyond its {self.size} bytes")
        longest = max(map(len, self.tokens), default=0)
        return Gguf(
            version, self.size, start, alignment, self.metadata, tensors, (len(self.tokens), longest), self._special()
        )

    def _key(self) -> None:
        key = self.cursor.string("a key", 65_535)
        if not key or key in self.metadata:
            raise InvalidModel(f"key {key[:80]!r} is {'there twice' if key else 'empty'}")
        kind = self.cursor.u32()
        if kind in _SCALARS:
            self.metadata[key] = self.cursor.scalar(kind)
        elif kind == _STRING:
            self.metadata[key] = self.cursor.string(f"the value of {key[:80]!r}")
        elif kind == _ARRAY:
            self.metadata[key] = self._array(key)
        else:
            raise InvalidModel(f"key {key[:80]!r} has the unknown type {kind}")

    def _array(self, key: str) -> Array:
        kind, count = self.cursor.u32(), self.cursor.u64()
        if kind == _STRING:
            self.strings += count
            if self.strings > MAX_STRINGS or count * 8 > self.size:
                raise InvalidModel(f"array {key[:80]!r} claims {count} strings, which is absurd")
            if key == _TOKENS:
                self.tokens = [self.cursor.raw_string("a token", 65_535) for _ in range(count)]
            else:
                self._skip_strings(key, count)
            return Array(kind, count)
        if kind not in _SCALARS:
            # llama.cpp refuses arrays in arrays as well.
            raise InvalidModel(f"array {key[:80]!r} has elements of type {kind}, which is not supported")
        layout = _SCALARS[kind]
        if count * layout.size > min(self.size, MAX_HEADER_BYTES):
            raise InvalidModel(f"array {key[:80]!r} claims {count} values, which is absurd")
        if count > MAX_KEPT_ARRAY:
            self.cursor.skip(count * layout.size)
            return Array(kind, count)
        buffer, at = self.cursor.need(count * layout.size)
        values = struct.unpack_from(f"<{count}{layout.format[-1]}", buffer, at)
        return Array(kind, count, values)

    def _skip_strings(self, key: str, count: int) -> None:
        cursor = self.cursor
        for _ in range(count):
            length = cursor.u64()
            if length > MAX_STRING_BYTES:
                raise InvalidModel(f"a string of {key[:80]!r} is {length} bytes long, more than {MAX_STRING_BYTES}")
            cursor.skip(length)

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        # 32 is what memory-mapped tensors need; a page is far more than anybody uses.
        if not isinstance(alignment, int) or alignment < 32 or alignment > 65_536 or alignment & (alignment - 1):
            raise InvalidModel(f"general.alignment must be a power of two from 32 to 65536, not {alignment!r:.40}")
        return alignment

    def _tensors(self, count: int, alignment: int) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        expected = 0
        for _ in range(count):
            each = self._tensor()
            if each.name in tensors:
                raise InvalidModel(f"tensor {each.name!r} is there twice")
            if each.offset != expected:
                raise InvalidModel(f"tensor {each.name!r} is at offset {each.offset}, expected at {expected}")
            expected += -(-each.size_bytes // alignment) * alignment
            tensors[each.name] = each
        return tensors

    def _tensor(self) -> Tensor:
        cursor = self.cursor
        name = cursor.string("a tensor's name", MAX_NAME_BYTES)
        dimensions = cursor.u32()
        if not 1 <= dimensions <= 4:
            raise InvalidModel(f"tensor {name!r} has {dimensions} dimensions, not 1 to 4")
        shape = tuple(cursor.u64() for _ in range(dimensions))
        elements = 1
        for length in shape:
            elements *= length
        number = cursor.u32()
        offset = cursor.u64()
        kind = GGML_TYPES.get(number)
        if kind is None:
            raise InvalidModel(f"tensor {name!r} has the unknown type {number}")
        if not 0 < elements < 2**63:
            raise InvalidModel(f"tensor {name!r} has the absurd shape {shape}")
        if shape[0] % kind.block:
            raise InvalidModel(f"rows of tensor {name!r} have {shape[0]} values, no multiple of {kind.block}")
        size = elements // kind.block * kind.size
        if size > self.size:
            raise InvalidModel(f"the file is truncated: tensor {name!r} alone has {size} bytes, the file {self.size}")
        return Tensor(name, shape, kind, offset, elements, size)

    def _special(self) -> dict[int, str]:
        if len(set(self.tokens)) != len(self.tokens):
            raise InvalidModel("the tokenizer has the same token twice")
        special: dict[int, str] = {}
        for key, value in self.metadata.items():
            if not (key.startswith("tokenizer.ggml.") and key.endswith("_token_id")):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise InvalidModel(f"{key[:80]} is not a number")
            if not self.tokens:
                continue
            if not 0 <= value < len(self.tokens):
                raise InvalidModel(f"{key[:80]} is {value}, but there are {len(self.tokens)} tokens")
            special[value] = self.tokens[value].decode(errors="replace")
        return special
