"""`ask`: the command around the asker, which has tests of its own."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from ai_assistant.actions.ask import Asker, Proposal
from ai_assistant.errors import NotAuthorized, Unsure
from tests.cli.conftest import Cli
from tests.sdk.served import Served

LOOK = Proposal("temperature", {}, 0.98, False, False, "tell the temperature")
CHANGE = Proposal("reboot", {}, 0.97, True, False, "restart the machine")
CHINESE = Proposal("reboot", {}, 0.97, True, True, "重启机器")


class Script:
    """What the asker proposes, and what it was made to do."""

    def __init__(self) -> None:
        self.proposal: Proposal | Exception = LOOK
        self.questions: list[str] = []
        self.performed: list[tuple[str, bool]] = []

    async def propose(self, question: str) -> Proposal:
        self.questions.append(question)
        if isinstance(self.proposal, Exception):
            raise self.proposal
        return self.proposal

    async def perform(self, proposal: Proposal, *, confirm: bool = False) -> str:
        self.performed.append((proposal.action, confirm))
        return "45 °C"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, nothing: None) -> Script:
    made = Script()

    async def connected(self: object, *_: object) -> object:
        return self

    monkeypatch.setattr("ai_assistant.actions.ask.Asker", lambda complete, bus: made)
    monkeypatch.setattr("ai_assistant.actions.bus.SystemBus.__aenter__", connected)
    return made


def test_what_only_looks_is_done(cli: Cli, script: Script) -> None:
    result = cli("ask", "how warm is it?")
    assert (result.status, result.out, result.err) == (0, "45 °C\n", "")
    assert script.questions == ["how warm is it?"]
    assert script.performed == [("temperature", False)]


def test_words_need_no_quotes(cli: Cli, script: Script) -> None:
    cli("ask", "how", "warm", "is", "it")
    assert script.questions == ["how warm is it"]


def test_what_changes_is_refused_without_a_terminal(cli: Cli, script: Script) -> None:
    script.proposal = CHANGE
    for more in ((), ("--json",)):
        result = cli("ask", "restart", *more)
        assert result.status == 2
        assert "--yes" in result.err
        assert script.performed == []
    assert cli("ask", "restart", "--yes").out == "45 °C\n"
    assert script.performed == [("reboot", True)]


@pytest.mark.parametrize("proposal", [LOOK, CHANGE, CHINESE])
def test_a_dry_run_does_nothing(cli: Cli, script: Script, proposal: Proposal) -> None:
    script.proposal = proposal
    result = cli("ask", "x", "--dry-run")
    assert result.status == 0
    assert proposal.description in result.out
    assert ("changes the system" in result.out) is proposal.changes
    assert script.performed == []
    found = cli("ask", "x", "--dry-run", "--json").json
    assert found["answer"] is None
    assert found["action"] == proposal.action


def test_json(cli: Cli, script: Script) -> None:
    assert cli("ask", "x", "--json").json == {
        "action": "temperature",
        "arguments": {},
        "confidence": 0.98,
        "changes": False,
        "chinese": False,
        "description": "tell the temperature",
        "answer": "45 °C",
    }


@pytest.mark.parametrize(
    ("error", "status"),
    [(Unsure("I am not sure", hint="did you mean: this?"), 1), (NotAuthorized("no", hint="did you mean: this?"), 3)],
)
def test_refusals(cli: Cli, script: Script, error: Exception, status: int) -> None:
    script.proposal = error
    result = cli("ask", "x")
    assert result.status == status
    assert "hint: did you mean: this?" in result.err


def test_without_a_bus_it_is_4(cli: Cli, nothing: None) -> None:
    assert cli("ask", "how warm is it?").status == 4


def test_without_a_question_each_line_is_one(cli: Cli, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("how warm?\n\nhow full?\n"))
    assert cli("ask").out == "45 °C\n45 °C\n"
    assert script.questions == ["how warm?", "how full?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("how warm?\n"))
    script.proposal = Unsure("I am not sure")
    assert cli("ask").status == 1


class Anything:
    """A bus on which only the daemon is, and that knows its status."""

    async def call(
        self, name: str, path: str, interface: str, member: str, signature: str = "", body: Any = ()
    ) -> tuple[Any, ...]:
        if member == "GetStatus":
            return ({"models": [{"name": "assistant:1"}], "temperature_c": 45.0},)
        return ([],)


def test_the_question_goes_to_the_model_over_the_socket(cli: Cli, api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real asker and the real API server; only what the model says is scripted."""

    async def connected(self: object, *_: object) -> object:
        return self

    monkeypatch.setattr("ai_assistant.actions.bus.SystemBus.__aenter__", connected)
    monkeypatch.setattr("ai_assistant.actions.bus.SystemBus.call", Anything().call)
    result = cli("ask", "how warm is it?", "--json")
    # The scripted model calls every tool it is shown and gives no probabilities, which is no answer.
    assert result.status == 1
    assert result.error["name"] == "InternalError"
    sent = api.service.requests[-1]
    assert sent.tool_choice == "required"
    assert "temperature" in json.dumps([dict(each) for each in sent.tools])
    assert Asker is not None
