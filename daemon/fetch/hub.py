"""What a hub says of a repository, checked, and which of its files are meant.

The protocol is the Hugging Face Hub's: ``GET /api/models/{repo}/revision/{revision}?blobs=true`` lists the files with
their sizes and hashes (SHA-256 of files in LFS, git's SHA-1 of the others), and ``/{repo}/resolve/{commit}/{file}`` is
the file. Every name and number of an answer is somebody else's input.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ai_assistant.daemon.fetch.source import HubSource, usable_path
from ai_assistant.errors import DownloadFailed, NoSuchModel, NotSupported

MAX_FILES = 20_000
MAX_FILE_BYTES = 1 << 50
DEFAULT_QUANTIZATION = "Q4_K_M"
ONNX = "onnx"
BESIDE_ONNX = (
    "tokenizer.json", "tokenizer_config.json", "config.json", "special_tokens_map.json", "sentence_bert_config.json",
    "modules.json", "vocab.txt",
)  # fmt: skip
"""Small files that an ONNX model is of no use without, by name, in its folder or in the repository's."""
_SHOWN = 30
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_QUANTIZATION = re.compile(
    r"(?:^|[._/-])((?:ud-)?i?q\d+(?:_[0-9a-z]+)*|[bf]f?(?:16|32)|tq[12]_0|mxfp4)(?=[._/-]|$)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that can be fetched. Hashes in hex, empty where unknown; the size in bytes, -1 where unknown."""

    path: str
    url: str
    size_bytes: int = -1
    sha256: str = ""
    git_sha1: str = ""


def parse_listing(body: Any, source: HubSource) -> tuple[str, tuple[RemoteFile, ...]]:
    """(commit, files) of the hub's answer. Names that point anywhere else are left out.

    Raises:
        DownloadFailed: it is no such answer.
    """
    if not isinstance(body, Mapping) or not isinstance(body.get("siblings"), list):
        raise DownloadFailed("the hub's answer is no list of files", hint="is the endpoint a model hub?")
    commit = body.get("sha")
    if not isinstance(commit, str) or not _SHA1.fullmatch(commit):
        # Without a commit two requests may see different files; the hashes still tell.
        commit = source.revision
    siblings = body["siblings"]
    if len(siblings) > MAX_FILES:
        raise DownloadFailed(f"the repository lists {len(siblings)} files")
    found = {}
    for each in siblings:
        path = each.get("rfilename") if isinstance(each, Mapping) else None
        if isinstance(path, str) and usable_path(path) and path not in found:
            found[path] = _file(path, each, source.file_url(path, commit))
    return commit, tuple(found.values())


def _file(path: str, values: Mapping[str, Any], url: str) -> RemoteFile:
    lfs = values.get("lfs")
    lfs = lfs if isinstance(lfs, Mapping) else {}
    blob = values.get("blobId") if not lfs else None
    return RemoteFile(
        path,
        url,
        _size(lfs.get("size", values.get("size"))),
        _hash(lfs.get("sha256", lfs.get("oid")), _SHA256),
        _hash(blob, _SHA1),
    )


def _size(value: Any) -> int:
    return value if type(value) is int and 0 <= value <= MAX_FILE_BYTES else -1


def _hash(value: Any, form: re.Pattern[str]) -> str:
    text = value.lower().removeprefix("sha256:") if isinstance(value, str) else ""
    return text if form.fullmatch(text) else ""


def choose(files: Sequence[RemoteFile], selector: str, shown: str) -> tuple[RemoteFile, ...]:
    """The files that `selector` means; the model itself comes first.

    Args:
        selector: a path, a quantisation as in a file's name, "onnx", or empty: the only GGUF, or the one at Q4_K_M.
        shown: the repository, for messages.

    Raises:
        NoSuchModel: nothing fits, or more than one file; the hint lists what there is.
        NotSupported: it is split into several files, or in a format that cannot be used.
    """
    by_path = {each.path: each for each in files}
    if selector in by_path:
        return _whole(by_path[selector], by_path)
    models = [each for each in files if _is_gguf(each.path)]
    onnx = [each for each in files if each.path.lower().endswith(".onnx")]
    if selector.lower() == ONNX or (not selector and not models and len(onnx) == 1):
        return _onnx(onnx, by_path, shown)
    if not selector and not models and not onnx:
        raise NotSupported(f"{shown} has neither a GGUF nor an ONNX model", hint="look for a repository that has one")
    candidates = models if not selector else [each for each in models if _fits(each.path, selector)]
    if not selector and len(candidates) > 1:
        candidates = [each for each in models if _fits(each.path, DEFAULT_QUANTIZATION)]
    whole = [each for each in candidates if not _SPLIT.search(each.path)]
    if not whole and candidates:
        raise NotSupported(f"{shown} is split into {len(candidates)} files", hint=_list(models) or "choose another")
    if len(whole) != 1:
        what = f"nothing that fits {selector!r}" if selector and not whole else "more than one model"
        raise NoSuchModel(f"{shown} has {what}", hint=_list([*models, *onnx]), param="source")
    return (whole[0],)


def _whole(file: RemoteFile, by_path: Mapping[str, RemoteFile]) -> tuple[RemoteFile, ...]:
    if _SPLIT.search(file.path):
        raise NotSupported(f"{file.path} is one part of a split model", hint=_list(by_path.values()))
    if file.path.lower().endswith(".onnx"):
        return _with_onnx(file, by_path)
    return (file,)


def _onnx(onnx: Sequence[RemoteFile], by_path: Mapping[str, RemoteFile], shown: str) -> tuple[RemoteFile, ...]:
    plain = [each for each in onnx if each.path.rpartition("/")[2] == "model.onnx"]
    found = plain if len(plain) == 1 else onnx
    if len(found) != 1:
        raise NoSuchModel(f"{shown} has {len(onnx)} ONNX models", hint=_list(onnx), param="source")
    return _with_onnx(found[0], by_path)


def _with_onnx(file: RemoteFile, by_path: Mapping[str, RemoteFile]) -> tuple[RemoteFile, ...]:
    folder = file.path.rpartition("/")[0]
    beside = []
    for name in BESIDE_ONNX:
        near = by_path.get(f"{folder}/{name}") if folder else None
        chosen = near or by_path.get(name)
        if chosen is not None:
            beside.append(chosen)
    if any(path.startswith((file.path + "_data", file.path + ".data")) for path in by_path):
        raise NotSupported(f"{file.path} keeps its weights in other files", hint="choose one that is whole")
    return (file, *beside)


def _is_gguf(path: str) -> bool:
    name = path.rpartition("/")[2].lower()
    return name.endswith(".gguf") and not name.startswith("mmproj") and "imatrix" not in name


def _fits(path: str, quantization: str) -> bool:
    return any(each.lower() == quantization.lower() for each in _QUANTIZATION.findall(path))


def _list(files: Iterable[RemoteFile]) -> str:
    """What there is, for a hint: quantisations where the names have them, else paths."""
    whole = [each for each in files if (_is_gguf(each.path) or each.path.lower().endswith(".onnx"))]
    whole = [each for each in whole if not _SPLIT.search(each.path)]
    if not whole:
        return ""
    names = sorted(_name(each.path) for each in whole)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return "there is: " + ", ".join(each[:120] for each in names[:_SHOWN]) + more


def _name(path: str) -> str:
    found = _QUANTIZATION.findall(path)
    return f"{path} ({found[-1].upper()})" if found else path
