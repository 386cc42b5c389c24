"""The public names of AI Assistant OS; everything else is an implementation detail.

    from ai_assistant import InferenceEngine

Names are imported when they are first used, so `import ai_assistant` costs next to nothing and needs
nothing but the standard library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "AIAssistantError",
    "AlreadyExists",
    "AsyncClient",
    "AsyncInferenceEngine",
    "AsyncJob",
    "AsyncTextStream",
    "BackendFailed",
    "Busy",
    "Cancelled",
    "Client",
    "Completion",
    "ContextOverflow",
    "Device",
    "DeviceKind",
    "DeviceLost",
    "DownloadFailed",
    "DriverState",
    "FinishReason",
    "InferenceEngine",
    "InternalError",
    "InvalidArgument",
    "InvalidConfig",
    "InvalidModel",
    "InvalidRecoveryKey",
    "Job",
    "JobStatus",
    "Message",
    "Model",
    "NoRecoveryKey",
    "NoSpace",
    "NoSuchJob",
    "NoSuchModel",
    "NotAuthorized",
    "NotSupported",
    "OutOfMemory",
    "Ranked",
    "ResealFailed",
    "SelfTestResult",
    "ServiceUnavailable",
    "TextStream",
    "Timeout",
    "TokenLogprob",
    "ToolCall",
    "Unsure",
    "Usage",
    "WorkerCrashed",
    "__version__",
]

if TYPE_CHECKING:
    from ai_assistant._results import Completion, JobStatus, Message, Model, Ranked, SelfTestResult
    from ai_assistant._streams import AsyncTextStream, TextStream
    from ai_assistant.client import AsyncClient, AsyncJob, Client, Job
    from ai_assistant.engines.contract import FinishReason, TokenLogprob, ToolCall, Usage
    from ai_assistant.errors import (
        AIAssistantError,
        AlreadyExists,
        BackendFailed,
        Busy,
        Cancelled,
        ContextOverflow,
        DeviceLost,
        DownloadFailed,
        InternalError,
        InvalidArgument,
        InvalidConfig,
        InvalidModel,
        InvalidRecoveryKey,
        NoRecoveryKey,
        NoSpace,
        NoSuchJob,
        NoSuchModel,
        NotAuthorized,
        NotSupported,
        OutOfMemory,
        ResealFailed,
        ServiceUnavailable,
        Timeout,
        Unsure,
        WorkerCrashed,
    )
    from ai_assistant.hal.device import Device, DeviceKind, DriverState
    from ai_assistant.inference import AsyncInferenceEngine, InferenceEngine

_HOMES = {
    "ai_assistant._results": ("Completion", "JobStatus", "Message", "Model", "Ranked", "SelfTestResult"),
    "ai_assistant._streams": ("AsyncTextStream", "TextStream"),
    "ai_assistant.client": ("AsyncClient", "AsyncJob", "Client", "Job"),
    "ai_assistant.engines.contract": ("FinishReason", "TokenLogprob", "ToolCall", "Usage"),
    "ai_assistant.hal.device": ("Device", "DeviceKind", "DriverState"),
    "ai_assistant.inference": ("AsyncInferenceEngine", "InferenceEngine"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module(_HOME.get(name, "ai_assistant.errors")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
