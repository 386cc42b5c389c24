"""The conformance suite: what a backend must do to be certified. docs/certification.md has the rules.

    certify ── run.py ──(a process of its own)── child.py ── L1 contract and ABI, L2 runtime, L3 operators, L4 models
       │                 crash, hang → a failure of that case, and a new process for the rest
       └─ levels.py → report.py (signed JSON) and matrix.py (Markdown, HTML)

L1 and L2 need NumPy only. L3 and L4 compare with `onnx.reference`, and need the packages onnx and hypothesis.
"""

VERSION = "1.1"
"""Major: reports of older suites do not count any more. Minor: cases were added."""
