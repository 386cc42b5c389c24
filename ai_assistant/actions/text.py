"""What the built-in model sees of a question: plain text with the names in it replaced by marks.

A tiny model copies arbitrary names badly and would invent some. So code finds the names, by comparing
with those that exist right now, and the model reads ``load model-1``; what it says about ``model-1`` is
translated back. The recipe trains on the same form.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

UNKNOWN = "unknown"
"""The value of a live parameter when the question names nothing that exists."""
MAX_QUESTION = 400
"""Characters of a question that the model is asked about; what it can act on is far shorter."""
_MAX_MARKS = 3

_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_APOSTROPHES = re.compile(r"['’‘`´]")
_CONTROL_TOKENS = re.compile(r"<\|[^|<>]*\|>")
# Dots, colons, hyphens, slashes and underscores live inside names; at the end of a word they are punctuation.
_PUNCTUATION = re.compile(r"[^\w\s.:/+%-]|[.:/+-]+(?=\s|$)|(?<!\S)[.:/+-]+(?=\s|$)")
_EDGE = re.compile(rf"(?<=[{_CJK}])(?=[a-z0-9])|(?<=[a-z0-9])(?=[{_CJK}])")
_SEPARATORS = re.compile(r"[\s._:/-]+")

# Names of cities that are everyday words: never taken for a time zone.
_COMMON_WORDS = frozenset({
    "act", "center", "central", "christmas", "continental", "east", "easter", "general", "jersey", "knox",
    "midway", "mountain", "north", "pacific", "resolute", "reunion", "south", "troll", "wake", "west", "yap",
})  # fmt: skip
_REGIONS = frozenset(
    ("africa", "america", "antarctica", "arctic", "asia", "atlantic", "australia", "europe", "indian", "pacific")
)
# Model names that are words of ordinary questions count only when they are written with their version.
_PLAIN_WORDS = frozenset({
    "model", "models", "status", "state", "temperature", "temp", "power", "profile", "performance", "balanced",
    "memory", "disk", "load", "log", "logs", "version", "time", "date", "zone", "address", "system", "machine",
    "device", "reboot", "restart", "update", "help", "cpu", "kernel", "host", "name", "service", "services",
    "test", "check", "session", "user", "users", "show", "list", "set", "remove", "delete", "unload", "start",
    "stop", "all", "now", "one", "any", "the", "it", "this", "that", "please", "assistant", "default", "small",
    "large", "big", "chat", "base",
})  # fmt: skip
_CHINESE_CITIES: Mapping[str, str] = {
    "北京": "Asia/Shanghai", "上海": "Asia/Shanghai", "中国": "Asia/Shanghai", "香港": "Asia/Hong_Kong",
    "台北": "Asia/Taipei", "东京": "Asia/Tokyo", "首尔": "Asia/Seoul", "新加坡": "Asia/Singapore",
    "曼谷": "Asia/Bangkok", "迪拜": "Asia/Dubai", "德里": "Asia/Kolkata", "悉尼": "Australia/Sydney",
    "伦敦": "Europe/London", "巴黎": "Europe/Paris", "柏林": "Europe/Berlin", "罗马": "Europe/Rome",
    "马德里": "Europe/Madrid", "莫斯科": "Europe/Moscow", "苏黎世": "Europe/Zurich", "维也纳": "Europe/Vienna",
    "纽约": "America/New_York", "芝加哥": "America/Chicago", "洛杉矶": "America/Los_Angeles",
    "多伦多": "America/Toronto", "圣保罗": "America/Sao_Paulo", "开罗": "Africa/Cairo",
}  # fmt: skip


def is_chinese(text: str) -> bool:
    """Whether the answer should be Chinese: the question has a Chinese character outside of names."""
    return re.search(f"[{_CJK}]", text) is not None


def normalise(text: str) -> str:
    """Lower case, half-width, single spaces, no punctuation, and a space between Chinese and Latin letters."""
    text = unicodedata.normalize("NFKC", text)
    text = _CONTROL_TOKENS.sub(" ", text).casefold()
    text = _APOSTROPHES.sub("", text)
    text = "".join(" " if unicodedata.category(each).startswith("C") else each for each in text)
    text = _PUNCTUATION.sub(" ", text)
    text = _EDGE.sub(" ", text)
    return " ".join(text.split())


@dataclass(frozen=True, slots=True)
class Marked:
    """A normalised question, and for each live kind (``model``, ``zone``) the name behind each mark."""

    text: str
    values: Mapping[str, Mapping[str, str]]

    def choices(self, kind: str) -> tuple[str, ...]:
        """The values that a parameter of this kind may take: the marks in the question, then `UNKNOWN`."""
        return (*self.values.get(kind, {}), UNKNOWN)


def mark(question: str, live: Mapping[str, Sequence[str]]) -> Marked:
    """Normalise a question and replace the names in it by marks such as ``model-1`` and ``zone-1``.

    Args:
        question: as typed; only the first `MAX_QUESTION` characters count.
        live: the names that exist, by kind.
    """
    text = normalise(question[:MAX_QUESTION])
    found: dict[str, dict[str, str]] = {}
    for kind, names in live.items():
        text, found[kind] = _replace(text, kind, _aliases(kind, names))
    return Marked(" ".join(text.split()), found)


def _aliases(kind: str, names: Iterable[str]) -> dict[str, str]:
    """What people call a name -> the name; what could mean two names is left out, unless it is exact."""
    if kind == "zone":
        return _zone_aliases(names)
    exact: dict[str, str] = {}
    loose: dict[str, set[str]] = {}
    for name in names:
        full = normalise(name)
        exact[full] = name
        bare, _, version = full.partition(":")
        for alias in (f"{bare} {version}", bare, bare.replace("-", " "), bare.replace("-", "")):
            if alias not in _PLAIN_WORDS and len(alias) > 1:
                loose.setdefault(alias, set()).add(name)
    return {alias: next(iter(owners)) for alias, owners in loose.items() if len(owners) == 1} | exact


def _zone_aliases(names: Iterable[str]) -> dict[str, str]:
    aliases: dict[str, str] = {}
    known = set(names)
    for name in sorted(known):
        full = name.casefold()
        city = full.rpartition("/")[2].replace("_", " ")
        if full.partition("/")[0] in _REGIONS and "/" in name and city not in _COMMON_WORDS:
            aliases.setdefault(city, name)
        if "/" in name or name in ("UTC", "GMT"):
            aliases[full] = name
            aliases[full.replace("_", " ")] = name
    return aliases | {city: zone for city, zone in _CHINESE_CITIES.items() if zone in known}


def _replace(text: str, kind: str, aliases: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Longest alias first, so that ``qwen:0.5b`` is not read as ``qwen`` with something behind it."""
    marks: dict[str, str] = {}
    if not aliases:
        return text, marks
    ordered = sorted(aliases, key=lambda each: (-len(each), each))
    pattern = "|".join(_pattern(each) for each in ordered)
    flat = {_SEPARATORS.sub(" ", alias): name for alias, name in reversed([(each, aliases[each]) for each in ordered])}

    def one(match: re.Match[str]) -> str:
        name = flat[_SEPARATORS.sub(" ", match.group(0))]
        for known, value in marks.items():
            if value == name:
                return f" {known} "
        if len(marks) == _MAX_MARKS:
            return match.group(0)
        new = f"{kind}-{len(marks) + 1}"
        marks[new] = name
        return f" {new} "

    return re.sub(pattern, one, text), marks


def _pattern(alias: str) -> str:
    if re.search(f"[{_CJK}]", alias):
        return re.escape(alias)
    body = r"[\s._:/-]".join(re.escape(part) for part in _SEPARATORS.split(alias) if part)
    return rf"(?<![a-z0-9._:/-]){body}(?![a-z0-9]|[._:/-][a-z0-9])"
