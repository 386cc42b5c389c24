"""What is in a picture? A classifier in an ONNX file, on whatever devices this machine has.

    classify.py MODEL.onnx PICTURE.npy [--json] [--save SCORES.npy]

Nothing here names a device or a kind of processor; HETERO_COMPUTE may.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from pathlib import Path

import numpy as np

from ai_assistant.errors import AIAssistantError
from ai_assistant.hal import hetero, onnx_graph


def main() -> int:
    parser = argparse.ArgumentParser(description="What is in a picture?")
    parser.add_argument("model", type=Path)
    parser.add_argument("picture", type=Path, help="an array as the model wants it")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", type=Path, help="where to put every score")
    options = parser.parse_args()
    try:
        graph = onnx_graph.read(options.model.read_bytes())
        picture = np.load(options.picture, allow_pickle=False)
        with hetero.open_devices() as devices:
            plan = hetero.plan(graph, devices, hetero.from_environment())
            with hetero.Executor(plan) as executor:
                scores = executor.run([picture])[0]
                used = {name: devices.versions[name] for name in executor.plan.devices}
    except (AIAssistantError, EOFError, OSError, ValueError) as error:
        print(f"classify: {error}", file=sys.stderr)
        if hint := getattr(error, "hint", ""):
            print(f"  hint: {hint}", file=sys.stderr)
        return 1
    flat = scores.ravel()
    best = [(int(index), round(float(flat[index]), 2)) for index in np.argsort(-flat)[:5]]
    # Devices add in different orders, so the digest is of what they agree on: the five best and two decimals.
    digest = hashlib.sha256(json.dumps(best).encode()).hexdigest()[:16]
    if options.json:
        answer = {"best": best, "digest": digest, "devices": used, "machine": platform.machine()}
        print(json.dumps(answer), flush=True)
    else:
        for index, score in best:
            print(f"class {index:4d}  {score:6.2f}", flush=True)
        print(f"digest {digest}, {platform.machine()}, {', '.join(used.values())}", flush=True)
    if options.save:
        np.save(options.save, scores)
    return 0


if __name__ == "__main__":
    sys.exit(main())
