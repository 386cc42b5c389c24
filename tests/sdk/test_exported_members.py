"""The public names: all there, typed, and cheap to have."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_type_hints

import pytest

import ai_assistant
from ai_assistant import errors
from ai_assistant._results import GenerateParams
from ai_assistant.engines.contract import GenerateRequest

CHECKOUT = Path(__file__).resolve().parents[2]


def fresh(program: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=CHECKOUT, check=True)
    return done.stdout.strip()


def test_every_name_is_there_and_has_a_home() -> None:
    for name in ai_assistant.__all__:
        found = getattr(ai_assistant, name)
        if isinstance(found, type):
            assert found.__name__ == name


def test_every_error_is_exported() -> None:
    assert set(errors.__all__) - {"from_name"} <= set(ai_assistant.__all__)


def test_names_are_sorted_and_unique() -> None:
    assert list(ai_assistant.__all__) == sorted(set(ai_assistant.__all__))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = ai_assistant.Nothing
    assert "InferenceEngine" in dir(ai_assistant)


def test_import_needs_only_the_standard_library() -> None:
    """Neither a dependency nor our own modules, until a name is used."""
    program = (
        "import sys; sys.modules.update({m: None for m in ('dbus_fast','rich','typer','jinja2','numpy','httpx')});"
        "before = set(sys.modules); import ai_assistant;"
        "print(*sorted(m for m in set(sys.modules) - before if m.split('.')[0] not in sys.stdlib_module_names))"
    )
    assert fresh(program) == "ai_assistant"


def test_the_client_and_the_engine_import_no_bus_library_and_no_engine() -> None:
    program = (
        "import sys; from ai_assistant import Client, InferenceEngine, AsyncClient;"
        "print(*[m for m in ('dbus_fast','rich','typer','jinja2','numpy','httpx','llama_cpp') if m in sys.modules])"
    )
    assert fresh(program) == ""


def test_the_sdk_does_not_import_the_daemon() -> None:
    program = (
        "import sys; import ai_assistant; [getattr(ai_assistant, n) for n in ai_assistant.__all__];"
        "import ai_assistant._manager; print(*[m for m in sys.modules if m.startswith('ai_assistant.daemon')])"
    )
    assert fresh(program) == ""


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert project["version"] == ai_assistant.__version__


def test_keyword_arguments_are_those_of_a_request() -> None:
    fields = set(get_type_hints(GenerateRequest)) - {"prompt", "messages"}
    assert set(GenerateParams.__annotations__) == fields - {"response_regex"} | {"regex", "keep_alive"}
