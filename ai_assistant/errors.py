"""The one error tree of the product.

Every error has a name that is the same everywhere: ``org.ai_assistant1.Error.<name>`` on the bus,
``error.code`` on the socket, and the class here. The message is for a person, and never contains a
traceback; the hint, where there is one, says what to do next.

    AIAssistantError
    ├── InvalidArgument            the caller's mistake: what was wrong, and which parameter
    │   ├── ContextOverflow        prompt (and max_tokens) do not fit the model's context
    │   ├── InvalidModel           the file is no usable model: truncated, hostile, wrong kind
    │   └── InvalidConfig          a configuration file is wrong
    ├── NoSuchModel
    ├── NoSuchJob
    ├── NoRecoveryKey              none waits to be acknowledged
    ├── InvalidRecoveryKey         its file is damaged, or others could read it
    ├── ResealFailed               the storage could not be bound to the TPM anew, with what the tool said
    ├── AlreadyExists
    ├── Busy                       in use, or the queue is full; try again later
    ├── NotAuthorized
    ├── NoSpace                    disk
    ├── DownloadFailed             the source cannot be reached, or what it sent is not what it promised
    ├── OutOfMemory                the model does not fit, with the numbers
    ├── NotSupported               this machine, image or model cannot do that
    ├── Unsure                     the built-in model is not sure enough to act
    ├── Cancelled
    ├── Timeout
    ├── WorkerCrashed              the process that held the model died; it is being restarted
    ├── DeviceLost                 a device went away while it was used; others may go on
    ├── BackendFailed              a device's driver or library failed, hung or broke its contract
    ├── ServiceUnavailable         the daemon cannot be reached
    └── InternalError              a defect of ours; details are in the journal
"""

from __future__ import annotations

__all__ = [
    "AIAssistantError",
    "AlreadyExists",
    "BackendFailed",
    "Busy",
    "Cancelled",
    "ContextOverflow",
    "DeviceLost",
    "DownloadFailed",
    "InternalError",
    "InvalidArgument",
    "InvalidConfig",
    "InvalidModel",
    "InvalidRecoveryKey",
    "NoRecoveryKey",
    "NoSpace",
    "NoSuchJob",
    "NoSuchModel",
    "NotAuthorized",
    "NotSupported",
    "OutOfMemory",
    "ResealFailed",
    "ServiceUnavailable",
    "Timeout",
    "Unsure",
    "WorkerCrashed",
    "from_name",
]

BUS_PREFIX = "org.ai_assistant1.Error."


class AIAssistantError(Exception):
    """Base of every error that the product raises on purpose.

    Args:
        message: one sentence for a person.
        hint: what to do about it; may be empty.
        param: the request parameter that is wrong, where that is known.
    """

    http_status = 500

    def __init__(self, message: str, *, hint: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param

    @property
    def name(self) -> str:
        """The error's name without a prefix, as in ``NoSuchModel``."""
        return type(self).__name__

    @property
    def bus_name(self) -> str:
        return BUS_PREFIX + self.name

    def to_dict(self) -> dict[str, str | None]:
        """What goes over a wire; `from_name` is the other way."""
        return {"name": self.name, "message": self.message, "hint": self.hint, "param": self.param}


class InvalidArgument(AIAssistantError):
    http_status = 400


class ContextOverflow(InvalidArgument):
    pass


class InvalidModel(InvalidArgument):
    pass


class InvalidConfig(InvalidArgument):
    pass


class NoSuchModel(AIAssistantError):
    http_status = 404


class NoSuchJob(AIAssistantError):
    http_status = 404


class NoRecoveryKey(AIAssistantError):
    http_status = 404


class InvalidRecoveryKey(AIAssistantError):
    pass


class ResealFailed(AIAssistantError):
    pass


class AlreadyExists(AIAssistantError):
    http_status = 409


class Busy(AIAssistantError):
    http_status = 429


class NotAuthorized(AIAssistantError):
    http_status = 403


class NoSpace(AIAssistantError):
    http_status = 507


class DownloadFailed(AIAssistantError):
    http_status = 502


class OutOfMemory(AIAssistantError):
    http_status = 507


class NotSupported(AIAssistantError):
    http_status = 501


class Unsure(AIAssistantError):
    http_status = 422


class Cancelled(AIAssistantError):
    http_status = 499


class Timeout(AIAssistantError):
    http_status = 504


class WorkerCrashed(AIAssistantError):
    http_status = 503


class DeviceLost(AIAssistantError):
    http_status = 503


class BackendFailed(AIAssistantError):
    pass


class ServiceUnavailable(AIAssistantError):
    http_status = 503


class InternalError(AIAssistantError):
    pass


def from_name(name: str, message: str, *, hint: str = "", param: str | None = None) -> AIAssistantError:
    """Rebuild an error from its name; an unknown name becomes `InternalError` with the same message."""
    bare = name.removeprefix(BUS_PREFIX)
    found = globals().get(bare)
    if isinstance(found, type) and issubclass(found, AIAssistantError):
        return found(message, hint=hint, param=param)
    return InternalError(message, hint=hint, param=param)
