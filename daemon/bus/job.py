"""org.ai_assistant1.Job: one object for each job, until ten minutes after its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dbus_fast import Variant

from ai_assistant.daemon.authority import Authority
from ai_assistant.daemon.contract import Scope
from ai_assistant.daemon.jobs import Job
from ai_assistant.errors import AIAssistantError
from ai_assistant.services.connection import Call
from ai_assistant.services.values import variants

INTERFACE = "org.ai_assistant1.Job"


class JobObject:
    def __init__(self, job: Job, authority: Authority, model_path: Callable[[str], str | None]) -> None:
        self._job = job
        self._authority = authority
        self._model_path = model_path

    def properties(self) -> Mapping[str, Any]:
        job = self._job
        result = {key: Variant("s", str(value)) for key, value in job.result.items()}
        path = self._model_path(str(job.result["name"])) if "name" in job.result else None
        if path is not None:
            result["model"] = Variant("o", path)
        return {
            "Kind": job.kind,
            "State": str(job.state),
            "Progress": job.progress,
            "Message": job.message,
            "Details": variants(job.details),
            "Error": [job.error.bus_name, _text(job.error)] if job.error is not None else ["", ""],
            "Result": result,
            "Created": job.created,
        }

    async def cancel(self, call: Call) -> None:
        if await self._authority.uid(call.sender) != self._job.owner_uid:
            await self._authority.require(call, Scope.REMOVE)
        self._job.cancel()


def _text(error: AIAssistantError) -> str:
    """Message and hint, as in an error reply."""
    return f"{error.message} (hint: {error.hint})" if error.hint else error.message
