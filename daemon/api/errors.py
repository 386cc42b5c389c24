"""Errors in the shape that OpenAI clients read."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

from ai_assistant.errors import (
    AIAssistantError,
    Busy,
    NoSpace,
    NotAuthorized,
    NotSupported,
    OutOfMemory,
    ServiceUnavailable,
    WorkerCrashed,
)

RETRY_AFTER_S: dict[type[AIAssistantError], int] = {Busy: 1, WorkerCrashed: 2, ServiceUnavailable: 2}
"""Errors that pass by themselves, and when to try again. A worker is back within a second or two."""

# Official clients repeat every 5xx; these come out the same each time.
_FINAL = (NotSupported, OutOfMemory, NoSpace)


class HttpError(Exception):
    """An error of the tree that HTTP has its own status for, as in 413 for a body that is too long."""

    def __init__(
        self,
        status: int,
        error: AIAssistantError,
        *,
        close: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(error.message)
        self.status = status
        self.error = error
        self.close = close
        self.headers = headers or {}


def error_body(error: AIAssistantError, status: int | None = None) -> dict[str, dict[str, str | None]]:
    """{"error": {message, type, param, code, hint}}; `code` is the name in the error tree."""
    return {
        "error": {
            "message": error.message,
            "type": _type(error, status or error.http_status),
            "param": error.param,
            "code": error.name,
            "hint": error.hint,
        }
    }


def error_bytes(error: AIAssistantError, status: int | None = None) -> bytes:
    return json.dumps(error_body(error, status), ensure_ascii=False).encode("utf-8", "replace")


def error_headers(error: AIAssistantError) -> dict[str, str]:
    headers: dict[str, str] = {}
    for kind, seconds in RETRY_AFTER_S.items():
        if isinstance(error, kind):
            headers["retry-after"] = str(seconds)
    if isinstance(error, _FINAL):
        headers["x-should-retry"] = "false"
    return headers


def error_response(
    error: AIAssistantError, status: int = 0, *, close: bool = False, headers: Mapping[str, str] | None = None
) -> Response:
    made = error_headers(error) | dict(headers or {})
    if close:
        made["connection"] = "close"
    status = status or error.http_status
    return Response(error_bytes(error, status), status, made, media_type="application/json")


def retry_after(seconds: int) -> dict[str, str]:
    return {"retry-after": str(seconds)}


def _type(error: AIAssistantError, status: int) -> str:
    if isinstance(error, NotAuthorized):
        return "authentication_error" if status == 401 else "permission_error"
    if isinstance(error, Busy):
        return "rate_limit_error"
    if status < 500 or isinstance(error, NotSupported):
        return "invalid_request_error"
    return "server_error"
