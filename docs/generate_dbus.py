"""Writes docs/dbus.md from the interfaces' XML: ``python3 docs/generate_dbus.py [--check]``."""

from __future__ import annotations

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from ai_assistant.daemon import bus  # noqa: E402 - after the path to it
from ai_assistant.services import schema  # noqa: E402
from ai_assistant.tee import vault  # noqa: E402

TARGET = CHECKOUT / "docs" / "dbus.md"
_HEAD = """# D-Bus reference

Generated from `daemon/bus/xml` and `tee/vault` by `docs/generate_dbus.py`; do not edit.

Bus name `org.ai_assistant1` on the system bus. `/org/ai_assistant1` has the interfaces Manager and Inference and is
the ObjectManager of `/org/ai_assistant1/models/<n>` (Model) and `/org/ai_assistant1/jobs/<n>` (Job). Errors are named
`org.ai_assistant1.Error.<Name>`; the names are in `ai_assistant/errors.py`. All properties are read-only.

Bus name `org.ai_assistant1.Vault` is a service of its own, started on demand: how the storage is protected, and the key
that opens it without the TPM, at `/org/ai_assistant1/vault` (Vault).

    busctl tree org.ai_assistant1
    busctl call org.ai_assistant1 /org/ai_assistant1 org.ai_assistant1.Inference \\
        Generate 'ssa{sv}' assistant:1 'hello' 0
"""


def render() -> str:
    """The whole document."""
    parts = [_HEAD]
    for interface in (*map(bus.load, bus.NAMES), vault.load()):
        parts.append(_interface(interface))
    return "\n".join(parts)


def _interface(interface: schema.Interface) -> str:
    lines = [f"## {interface.name}", "", interface.text, ""]
    if interface.properties:
        lines += ["| property | type | |", "|---|---|---|"]
        lines += [f"| `{each.name}` | `{each.type}` | {_cell(each.text)} |" for each in interface.properties.values()]
        lines.append("")
    for method in interface.methods.values():
        lines += [f"### {_signature(method)}", "", method.text, ""]
        for direction, arguments in (("in", method.inputs), ("out", method.outputs)):
            for each in arguments:
                text = f": {each.text}" if each.text else ""
                lines.append(f"- {direction} `{each.name}` `{each.type}`{text}")
        if method.inputs or method.outputs:
            lines.append("")
    return "\n".join(lines)


def _signature(method: schema.Method) -> str:
    taken = ", ".join(f"{each.type} {each.name}" for each in method.inputs)
    given = ", ".join(f"{each.type} {each.name}" for each in method.outputs)
    return f"`{method.name}({taken})`" + (f" → `{given}`" if given else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    text = render()
    if "--check" in arguments:
        if TARGET.exists() and TARGET.read_text("utf-8") == text:
            return 0
        print("docs/dbus.md is not what the XML says: run docs/generate_dbus.py", file=sys.stderr)
        return 1
    TARGET.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
