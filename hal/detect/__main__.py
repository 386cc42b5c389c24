"""python3 -m ai_assistant.hal.detect: what was found, for people or (--json) for programs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ai_assistant.errors import AIAssistantError
from ai_assistant.hal.detect import detect
from ai_assistant.hal.detect.measure import measure
from ai_assistant.hal.device import Device


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m ai_assistant.hal.detect", description=__doc__)
    parser.add_argument("--json", action="store_true", help="a JSON list of devices")
    parser.add_argument("--root", type=Path, default=Path("/"), help="the machine's root folder")
    parser.add_argument("--firmware", type=Path, action="append", help="look for firmware here instead (repeatable)")
    parser.add_argument("--state", type=Path, help="the folder that keeps measurements")
    parser.add_argument("--measure", action="store_true", help="measure what is not kept in --state yet")
    options = parser.parse_args(arguments)
    if options.measure:
        if options.state is None:
            parser.error("--measure needs --state")
        try:
            measure(detect(options.root), options.state)
        except AIAssistantError as error:
            print(f"{error.message}\n  hint: {error.hint}", file=sys.stderr)
            return 1
    devices = detect(options.root, state=options.state, firmware=options.firmware)
    if options.json:
        print(json.dumps([device.to_dict() for device in devices], indent=2, ensure_ascii=False))
    else:
        print("\n".join(_line(device) for device in devices))
    return 0


def _line(device: Device) -> str:
    figures = ", ".join(str(one) for one in device.throughput)
    nodes = " ".join(device.nodes)
    text = f"{device.kind:<7} {device.state:<16} {device.name}"
    text += "".join(f"  {part}" for part in (device.driver, nodes, figures) if part)
    return f"{text}\n        hint: {device.hint}" if device.hint else text


if __name__ == "__main__":
    sys.exit(main())
