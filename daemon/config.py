"""The daemon's configuration: one table of typed rows, parsed into one frozen value.

Sources, later ones win: the defaults below, then every ``*.toml`` under ``/usr/lib/ai-assistant/config.d``,
``/etc/ai-assistant/config.d`` and ``/run/ai-assistant/config.d``. A file in a later folder replaces the one
of the same name in an earlier folder (an empty file or a link to ``/dev/null`` therefore masks it); what is
left is read in the order of the file names. Unknown keys are errors, so a typing mistake is not silent.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ai_assistant.errors import InvalidArgument, InvalidConfig
from ai_assistant.hal.hetero.intent import parse

DIRECTORIES = (
    "usr/lib/ai-assistant/config.d",
    "etc/ai-assistant/config.d",
    "run/ai-assistant/config.d",
)
DEFAULT = "default"
_MAX_FILE_BYTES = 1 << 20
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One setting. `low` and `high` bound numbers; `choices` lists what a string may be."""

    key: str
    """``section.name`` in the file, and ``section_name`` in `Config`."""
    kind: type
    default: Any
    text: str
    low: float = 0
    high: float = math.inf
    choices: tuple[str, ...] = ()
    parse: Callable[[str], object] | None = None
    """Raises InvalidArgument for a string that it does not understand."""

    @property
    def field(self) -> str:
        return self.key.replace(".", "_")


ROWS: tuple[Row, ...] = (
    Row("log.level", str, "info", "least severe message that is logged", choices=("debug", "info", "warning", "error")),
    Row("models.default", str, "assistant:1", "model that the built-in assistant uses"),
    Row("models.context_length", int, 0, "tokens per sequence; 0: chosen by model and memory", high=1 << 24),
    Row("models.sequences", int, 4, "generations of one model that run at the same time", low=1, high=256),
    Row("models.threads", int, 0, "threads per worker; 0: chosen by the machine", high=1024),
    Row("models.batch_tokens", int, 512, "tokens per decode step", low=32, high=65_536),
    Row("models.kv_type", str, "auto", "elements of the KV cache; auto: the best that the memory allows",
        choices=("auto", "f16", "q8_0", "q4_0")),
    Row("models.speculative", str, "auto", "guess tokens ahead: off, lookup, draft, or auto: what measures faster",
        choices=("auto", "off", "lookup", "draft")),
    Row("models.hetero_compute", str, "OFF", "devices that may share a language model: docs/hetero.md", parse=parse),
    Row("models.spill_memory_bytes", int, 0, "memory per model for states of idle conversations", high=1 << 50),
    Row("models.spill_disk_bytes", int, 0, "disk space per loaded model for the same", high=1 << 50),
    Row("models.idle_unload_s", float, 900.0, "unload a model that nobody used for so long; 0: never", high=1e7),
    Row("models.drain_timeout_s", float, 300.0, "longest time that draining a model waits", low=0.1, high=86_400),
    Row("models.memory_reserve_bytes", int, 192 * _MIB, "memory that loading a model leaves free", high=1 << 50),
    Row("models.disk_reserve_bytes", int, 256 * _MIB, "disk space that models never take: for updates", high=1 << 50),
    Row("pull.endpoint", str, "https://huggingface.co", "hub that hf: sources are pulled from"),
    Row("pull.allow_http", bool, False, "pull without encryption from other machines, too"),
    Row("pull.attempts", int, 8, "failures in a row, without progress, before a download fails", low=1, high=1000),
    Row("pull.retry_first_s", float, 1.0, "wait before the first retry; doubled for each further one", high=3600),
    Row("pull.stall_s", float, 60.0, "silence, or next to it, after which a connection is renewed", low=0.1, high=3600),
    Row("pull.keep_parts_s", float, 1_209_600.0, "keep an unfinished download for so long; 0: for ever", high=1e9),
    Row("worker.load_timeout_s", float, 600.0, "longest time that loading may take", low=1, high=86_400),
    Row("worker.restart_first_s", float, 1.0, "wait before the first restart of a crashed worker", low=0.05, high=3600),
    Row("worker.restart_longest_s", float, 60.0, "longest wait between restarts", low=0.05, high=86_400),
    Row("worker.restart_attempts", int, 5, "restarts in a row before giving up until the next request", high=1000),
    Row("service.drain_s", float, 10.0, "time that running generations get to finish on shutdown", high=3600),
    Row("limits.calls_per_caller", int, 64, "unanswered calls of one bus connection", low=1, high=65_536),
    Row("limits.streams_per_caller", int, 16, "open streams of one user", low=1, high=65_536),
    Row("limits.jobs_per_caller", int, 16, "unfinished jobs of one user", low=1, high=65_536),
    Row("limits.models_per_caller", int, 16, "transient models of one user", low=1, high=65_536),
)  # fmt: skip
_BY_KEY = {row.key: row for row in ROWS}
_SECTIONS = {row.key.partition(".")[0] for row in ROWS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every row of `ROWS`, under its key with an underscore for the dot. Units are in the names."""

    log_level: str
    models_default: str
    models_context_length: int
    models_sequences: int
    models_threads: int
    models_batch_tokens: int
    models_kv_type: str
    models_speculative: str
    models_hetero_compute: str
    models_spill_memory_bytes: int
    models_spill_disk_bytes: int
    models_idle_unload_s: float
    models_drain_timeout_s: float
    models_memory_reserve_bytes: int
    models_disk_reserve_bytes: int
    pull_endpoint: str
    pull_allow_http: bool
    pull_attempts: int
    pull_retry_first_s: float
    pull_stall_s: float
    pull_keep_parts_s: float
    worker_load_timeout_s: float
    worker_restart_first_s: float
    worker_restart_longest_s: float
    worker_restart_attempts: int
    service_drain_s: float
    limits_calls_per_caller: int
    limits_streams_per_caller: int
    limits_jobs_per_caller: int
    limits_models_per_caller: int


def load(root: Path | str = "/") -> Config:
    """Read the configuration below `root`.

    Raises:
        InvalidConfig: names the file and the key.
    """
    return Config(**{_BY_KEY[key].field: value for key, value, _ in explain(root)})


def explain(root: Path | str = "/") -> list[tuple[str, Any, str]]:
    """(key, value, source) of every setting, in the table's order; the source is a file or ``default``.

    Raises:
        InvalidConfig: names the file and the key.
    """
    merged: dict[str, tuple[Any, str]] = {row.key: (row.default, DEFAULT) for row in ROWS}
    for path in _files(Path(root)):
        for key, value in _read(path).items():
            merged[key] = (value, str(path))
    return [(key, *merged[key]) for key in _BY_KEY]


def _files(root: Path) -> list[Path]:
    found: dict[str, Path] = {}
    for directory in DIRECTORIES:
        try:
            names = sorted((root / directory).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise InvalidConfig(f"cannot read {root / directory}: {error.strerror}") from error
        found.update({path.name: path for path in names if path.suffix == ".toml"})
    return [found[name] for name in sorted(found)]


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
        if len(raw) > _MAX_FILE_BYTES:
            raise InvalidConfig(f"{path}: larger than {_MAX_FILE_BYTES} bytes")
        tree = tomllib.loads(raw.decode())
    except OSError as error:
        raise InvalidConfig(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidConfig(f"{path}: not valid TOML: {error}") from error
    out: dict[str, Any] = {}
    for section, values in tree.items():
        if section not in _SECTIONS or not isinstance(values, Mapping):
            hint = f"known sections: {', '.join(sorted(_SECTIONS))}"
            raise InvalidConfig(f"{path}: unknown key {section!r}", hint=hint, param=section)
        for name, value in values.items():
            key = f"{section}.{name}"
            out[key] = _checked(path, key, value)
    return out


def _checked(path: Path, key: str, value: Any) -> Any:
    row = _BY_KEY.get(key)
    if row is None:
        known = [each for each in _BY_KEY if each.partition(".")[0] == key.partition(".")[0]]
        raise InvalidConfig(f"{path}: unknown key {key!r}", hint=f"known here: {', '.join(known)}", param=key)
    if row.kind is float and type(value) is int:
        value = float(value)
    if type(value) is not row.kind:
        raise InvalidConfig(f"{path}: {key} must be {_KINDS[row.kind]}, not {type(value).__name__}", param=key)
    # NaN compares false with everything, so the test is for being inside.
    if isinstance(value, int | float) and not (row.low <= value <= row.high and math.isfinite(value)):
        raise InvalidConfig(f"{path}: {key} must be between {row.low:g} and {row.high:g}, not {value}", param=key)
    if row.choices and value not in row.choices:
        raise InvalidConfig(f"{path}: {key} must be one of {', '.join(row.choices)}", param=key)
    if row.parse is not None and isinstance(value, str):
        try:
            row.parse(value)
        except InvalidArgument as error:
            raise InvalidConfig(f"{path}: {key}: {error.message}", hint=error.hint, param=key) from error
    return value


_KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
