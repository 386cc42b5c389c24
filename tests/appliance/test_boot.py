"""The booted system itself: nothing failed, nothing open, nothing weak, and the toolchain is there."""

from __future__ import annotations

import re

import pytest

from image.container import Container

pytestmark = pytest.mark.appliance

TOOLS = (
    "gcc",
    "g++",
    "cmake",
    "ninja",
    "git",
    "gdb",
    "strace",
    "perf",
    "tmux",
    "vim",
    "jq",
    "busctl",
    "iasl",
    "python3-config",
    "ai-assistant",
    "ai_assistant",
    "login",
    "passwd",
)
EXPOSURE_MAX = 2.0


def test_nothing_failed(appliance: Container) -> None:
    assert appliance.run("systemctl", "is-system-running", "--wait").stdout.strip() == "running"
    assert appliance.run("systemctl", "--failed", "--no-legend", "--plain").stdout == ""


def test_the_journal_has_no_warnings_of_ours(appliance: Container) -> None:
    ours = appliance.run(
        "journalctl",
        "--boot",
        "--priority=warning",
        "--no-pager",
        "--output=cat",
        "--unit=ai-assistant*",
        "--grep=.",
        check=False,
    ).stdout
    assert ours == ""


@pytest.mark.parametrize(
    "unit",
    [
        "ai-assistantd.service",
        "ai-assistant-worker@.service",
        "ai-assistant-gpu-worker@.service",
        "ai-assistant-fetch@.service",
    ],
)
def test_exposure(appliance: Container, unit: str) -> None:
    report = appliance.run("systemd-analyze", "security", "--no-pager", unit).stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", report)
    assert found, report
    assert float(found[1]) <= EXPOSURE_MAX, report


def test_nothing_listens_on_the_network(appliance: Container) -> None:
    listening = appliance.run("ss", "--listening", "--tcp", "--udp", "--no-header", "--numeric").stdout
    outside = [line for line in listening.splitlines() if not re.search(r"127\.0\.0\.\d+|\[::1\]", line)]
    assert outside == []


def test_the_daemon_has_no_capabilities(appliance: Container) -> None:
    pid = appliance.run("systemctl", "show", "--property=MainPID", "--value", "ai-assistantd").stdout.strip()
    status = appliance.run("cat", f"/proc/{pid}/status").stdout
    for kind in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert re.search(rf"^{kind}:\s+0+$", status, re.MULTILINE), status
    assert not re.search(r"^Uid:\s+0\s", status, re.MULTILINE)


def test_the_toolchain_is_there(appliance: Container) -> None:
    missing = [tool for tool in TOOLS if appliance.run("which", tool, check=False).returncode != 0]
    assert missing == []


def test_a_c_extension_compiles(appliance: Container) -> None:
    source = "#include <Python.h>\nint main(void) { Py_Initialize(); return Py_FinalizeEx(); }"
    appliance.run(
        "sh",
        "-c",
        "cat >/tmp/a.c && cc /tmp/a.c $(python3-config --includes --ldflags --embed) -o /tmp/a.out && /tmp/a.out",
        stdin=source,
    )


def test_the_developer_logs_in_without_a_password_and_the_banner_says_so(appliance: Container) -> None:
    assert appliance.run("getent", "shadow", "developer").stdout.split(":")[1] == ""
    banner = appliance.run("cat", "/run/issue.d/ai-assistant.issue").stdout
    for word in ("password", "running", "assistant:1", "ai-assistant ask"):
        assert word in banner, banner
    assert appliance.run("systemctl", "is-active", "ssh", check=False).stdout.strip() != "active"


def test_the_product_is_compiled(appliance: Container) -> None:
    sources = appliance.run("find", "/usr/lib/ai-assistant/python", "-name", "*.py").stdout.split()
    compiled = appliance.run("find", "/usr/lib/ai-assistant/python", "-name", "*.cpython-313.pyc").stdout.split()
    assert len(sources) == len(compiled) > 50


def test_no_bytecode_is_compared_with_its_source(appliance: Container) -> None:
    """Python would read and hash each source that it imports; the root is verified as a whole."""
    program = (
        "import pathlib\n"
        "heads = [path.open('rb').read(8)[4:5] for path in pathlib.Path('/usr').rglob('*.pyc')]\n"
        "print(len(heads), heads.count(b'\\3'))\n"
    )
    total, checked = map(int, appliance.run("python3", "-c", program).stdout.split())
    assert total > 500
    assert checked == 0


def test_the_engine_picks_a_variant_for_this_processor(appliance: Container) -> None:
    variants = appliance.run(
        "sh", "-c", "ls /usr/lib/ai-assistant/python/llama_cpp/lib/libggml-cpu-*.so"
    ).stdout.split()
    assert len(variants) >= 10
    appliance.run("ai-assistant", "ask", "how much memory is free?")
    worker = appliance.run("pgrep", "-f", "ai_assistant.daemon.worker").stdout.split()[0]
    assert "libggml-cpu-" in appliance.run("cat", f"/proc/{worker}/maps").stdout


def test_configuration_shows_its_sources(appliance: Container) -> None:
    appliance.run("mkdir", "-p", "/etc/ai-assistant/config.d")
    appliance.run("sh", "-c", 'printf "[models]\\nsequences = 2\\n" >/etc/ai-assistant/config.d/50-test.toml')
    try:
        shown = appliance.run("ai-assistant", "config", "check").stdout
        assert re.search(r"sequences.*2.*50-test\.toml", shown), shown
        appliance.run("sh", "-c", 'printf "[models]\\nsequins = 2\\n" >/etc/ai-assistant/config.d/50-test.toml')
        wrong = appliance.run("ai-assistant", "config", "check", check=False)
        assert wrong.returncode != 0
        assert "sequins" in wrong.stderr
    finally:
        appliance.run("rm", "/etc/ai-assistant/config.d/50-test.toml")


def test_bash_completes_commands_and_models(appliance: Container) -> None:
    script = (
        "source /usr/share/bash-completion/bash_completion; "
        "source /usr/share/bash-completion/completions/ai-assistant; "
        "COMP_WORDS=(ai-assistant model show a); COMP_CWORD=3; _ai_assistant_completion ai-assistant; "
        'echo "${COMPREPLY[@]}"'
    )
    assert "assistant:1" in appliance.run("bash", "-c", script).stdout


def test_the_manual_is_on_board(appliance: Container) -> None:
    pages = appliance.run("ls", "/usr/share/doc/ai-assistant").stdout.split()
    assert {"api.md", "cli.md", "dbus.md", "sdk.md"} <= set(pages)


def test_the_developer_gets_in_without_a_password_and_owns_the_box(appliance: Container) -> None:
    # From another unprivileged account, so that it is PAM that lets the developer in, as at the console.
    groups = appliance.run("su", "--login", "developer", "--command", "groups", user="nobody").stdout
    assert {"ai-assistant", "ai-assistant-admin", "sudo"} <= set(groups.split())
