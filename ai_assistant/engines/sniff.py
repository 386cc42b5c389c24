"""Tells a model file's format by its content; names and suffixes are claims, not facts."""

from __future__ import annotations

import os
from enum import StrEnum

from ai_assistant.engines.gguf import MAGIC, opened
from ai_assistant.engines.onnx_package import holds_model, is_archive
from ai_assistant.errors import InvalidModel


class ModelFormat(StrEnum):
    GGUF = "gguf"
    ONNX = "onnx"
    SAFETENSORS = "safetensors"
    UNKNOWN = "unknown"


def sniff(path_or_fd: int | str | os.PathLike[str]) -> ModelFormat:
    """Look at the first bytes of a regular file; the descriptor's position stays where it is.

    A .tar or .zip is ONNX when there is a model.onnx in it.

    Raises:
        InvalidModel: the file cannot be read, or is no regular file.
    """
    with opened(path_or_fd) as fd:
        try:
            head = os.pread(fd, 512, 0)
        except OSError as error:
            raise InvalidModel(f"the file cannot be read: {error.strerror}") from error
        if is_archive(head):
            return ModelFormat.ONNX if holds_model(fd) else ModelFormat.UNKNOWN
        size = os.fstat(fd).st_size
    return sniff_bytes(head, size)


def sniff_bytes(head: bytes, size: int) -> ModelFormat:
    """The format of a file of `size` bytes that begins with `head` (64 bytes are enough)."""
    if head.startswith(MAGIC):
        return ModelFormat.GGUF
    if _is_safetensors(head, size):
        return ModelFormat.SAFETENSORS
    if _is_onnx(head):
        return ModelFormat.ONNX
    return ModelFormat.UNKNOWN


def _is_safetensors(head: bytes, size: int) -> bool:
    # An eight-byte length, then that much JSON, which is an object.
    length = int.from_bytes(head[:8], "little")
    return len(head) > 8 and 2 <= length <= size - 8 and head[8:9] == b"{"


def _is_onnx(head: bytes) -> bool:
    # ModelProto: field 1 is ir_version (a small varint), then come producer (2, 3), domain (4),
    # doc_string (6), graph (7) or opset_import (8), each length-delimited except model_version (5).
    if len(head) < 4 or head[0] != 0x08 or not 1 <= head[1] <= 0x20:
        return False
    return head[2] in (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)
