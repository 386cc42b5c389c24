"""The vault in the booted image: started by the bus, sandboxed, and honest about a container's storage."""

from __future__ import annotations

import json
import re
import time

import pytest

from image.container import Container
from tests.support.recovery import KEY

pytestmark = pytest.mark.appliance

NAME = "org.ai_assistant1.Vault"
UNIT = "ai-assistant-vaultd.service"
FOLDER = "/var/lib/ai-assistant-recovery"
ISSUE = "/run/issue.d/ai-assistant.issue"
EXPOSURE_MAX = 1.0


def active(appliance: Container) -> str:
    return appliance.run("systemctl", "is-active", UNIT, check=False).stdout.strip()


def test_exposure(appliance: Container) -> None:
    report = appliance.run("systemd-analyze", "security", "--no-pager", UNIT).stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", report)
    assert found, report
    print(found[0])
    assert float(found[1]) <= EXPOSURE_MAX, report


def test_a_call_starts_it_and_a_container_is_said_to_be_one(appliance: Container) -> None:
    found = json.loads(appliance.run("ai-assistant", "storage", "--json", user="nobody").stdout)
    assert (found["encryption"], found["recovery_key_pending"], found["opened_by"]) == ("unknown", False, "")
    assert "container" in found["reason"]
    assert active(appliance) == "active"
    status = json.loads(appliance.run("ai-assistant", "status", "--json").stdout)
    assert (status["storage_encryption"], status["recovery_key_pending"]) == ("unknown", False)
    assert "storage  unknown" in appliance.run("cat", ISSUE).stdout


def test_a_recovery_key_from_console_to_acknowledgement(appliance: Container) -> None:
    script = f"umask 077; echo {KEY} >{FOLDER}/key; touch /run/ai-assistant-storage/recovery-pending"
    appliance.run("sh", "-c", script)
    appliance.run("systemctl", "restart", "ai-assistant-banner.service")
    assert KEY in appliance.run("cat", ISSUE).stdout
    assert appliance.run("stat", "--format=%a %U", ISSUE).stdout.strip() == "600 root"
    assert KEY not in appliance.run("ai-assistant", "banner", user="nobody").stdout
    refused = appliance.run("ai-assistant", "storage", "recovery-key", user="nobody", check=False)
    assert (refused.returncode, KEY in refused.stdout + refused.stderr) == (3, False)
    assert KEY in appliance.run("ai-assistant", "storage", "recovery-key", user="developer").stdout
    appliance.run("ai-assistant", "storage", "acknowledge", "--yes", user="developer")
    assert appliance.run("ls", FOLDER).stdout.split() == ["acknowledged"]
    deadline = time.monotonic() + 60
    while KEY in appliance.run("cat", ISSUE).stdout:
        assert time.monotonic() < deadline, "the console still shows it"
        time.sleep(0.5)
    assert KEY not in appliance.run("journalctl", "--no-pager", "--output=export").stdout


def test_reseal_says_why_it_cannot(appliance: Container) -> None:
    """Through systemd-run, out of the sandbox and back."""
    failed = appliance.run("ai-assistant", "storage", "reseal", "--json", check=False)
    assert failed.returncode == 1
    error = json.loads(failed.stderr)["error"]
    assert error["name"] == "ResealFailed"
    assert "state.json" in error["message"], error


def test_it_has_no_rights_and_leaves(appliance: Container) -> None:
    appliance.run("ai-assistant", "storage")
    pid = appliance.run("systemctl", "show", "--property=MainPID", "--value", UNIT).stdout.strip()
    status = appliance.run("cat", f"/proc/{pid}/status").stdout
    for kind in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert re.search(rf"^{kind}:\s+0+$", status, re.MULTILINE), status
    assert "Max core file size        0 " in appliance.run("cat", f"/proc/{pid}/limits").stdout
    deadline = time.monotonic() + 120
    while active(appliance) != "inactive":
        assert time.monotonic() < deadline, "it does not leave"
        time.sleep(2)
    assert appliance.run("systemctl", "show", "--property=Result", "--value", UNIT).stdout.strip() == "success"
    # A call that comes while it leaves waits for the next instance.
    for _ in range(3):
        assert "storage" in appliance.run("ai-assistant", "storage").stdout
