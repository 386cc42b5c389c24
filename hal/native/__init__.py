"""Backends in a shared library: what `include/ai_hal.h` describes, as the classes of `ai_assistant.hal.contract`.

    library.py   load, agree on a version, call, errors        abi.py       the header's structures
    graphs.py    graphs as C structures                        programs.py  compiled graphs, kept ones
    memory.py    buffers, copies, views                        queues.py    submit, events, callbacks
    backend.py   probe, open, supports, compile

A library is vendor's code in this process: what it says is checked, but a crash takes the process along.
`ai_assistant.hal.remote` runs it in one of its own.
"""

from ai_assistant.hal.native.backend import NativeBackend

__all__ = ["NativeBackend"]
