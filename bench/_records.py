"""What benches keep: one JSON line per part that has ended, and the table in docs/performance.md made of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.harness import Row

_HERE = Path(__file__).parent
PATH = _HERE.parent / "build" / "bench-serving.jsonl"


@dataclass(frozen=True, slots=True)
class Record:
    part: str
    shape: str
    rows: tuple[Row, ...]
    machine: str


def append(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")


def done(path: Path) -> dict[tuple[str, str], Record]:
    """The last record of each part and shape. A line that was cut off when a run was killed is left out."""
    found: dict[tuple[str, str], Record] = {}
    if not path.exists():
        return found
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
            record = Record(
                values["part"], values["shape"], tuple(Row(**each) for each in values["rows"]), values["machine"]
            )
        except (ValueError, KeyError, TypeError):
            continue
        found[record.part, record.shape] = record
    return found


def machine() -> str:
    """Processor, threads that may be used, memory and load of this machine, for people."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    total = int(Path("/proc/meminfo").read_text().split()[1]) / 1e6
    return (
        f"{fields.get('model name', 'unknown processor')}, {len(os.sched_getaffinity(0))} threads, "
        f"{total:.1f} GB, load {os.getloadavg()[0]:.1f}"
    )


def table(records: Mapping[tuple[str, str], Record], wanted: Mapping[str, tuple[str, ...]]) -> str:
    """The Markdown table; `wanted` has the shapes of every part, and what is not there is "not measured"."""
    lines = ["| part | model | claim | ours | other | ratio | goal | holds |", "|---|---|---|---|---|---|---|---|"]
    machines = []
    for part, shapes in wanted.items():
        for shape in shapes:
            record = records.get((part, shape))
            if record is None:
                lines.append(f"| {part} | {shape} | not measured | | | | | |")
                continue
            machines.append(record.machine)
            for row in record.rows:
                bounds = "" if row.low == row.high else f" [{row.low:.2f}, {row.high:.2f}]"
                lines.append(
                    f"| {part} | {shape} | {row.claim} | {row.ours:.4g} | {row.other:.4g} | {row.ratio:.2f}{bounds} "
                    f"| {row.goal} | {'yes' if row.holds else 'no'} |"
                )
    # What is behind the last comma is the load, which was another one each time.
    plain = dict.fromkeys(each.rpartition(",")[0] or each for each in machines)
    return "\n".join(lines) + "\n" + "".join(f"\nMeasured on: {each}.\n" for each in plain)
