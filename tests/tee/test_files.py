"""What the image copies as it is fits the code."""

from __future__ import annotations

import configparser
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from ai_assistant.services import schema
from ai_assistant.tee import storage, vault
from ai_assistant.tee.vault import recovery, service

CHECKOUT = Path(__file__).resolve().parents[2]
DATA = CHECKOUT / "tee" / "data"
UNIT = DATA / "usr/lib/systemd/system/ai-assistant-vaultd.service"


def test_every_member_is_documented_and_answered() -> None:
    interface = vault.load()
    assert interface.name == vault.INTERFACE
    schema.check(interface, object.__new__(service.Vault))
    assert interface.text
    assert all(each.text for each in interface.methods.values())
    assert all(each.text for each in interface.properties.values())


def test_polkit_knows_what_the_vault_asks() -> None:
    policy = ElementTree.parse(DATA / "usr/share/polkit-1/actions/org.ai-assistant1.vault.policy")
    actions = {each.get("id", ""): each for each in policy.findall("action")}
    assert actions.keys() == {"org.ai-assistant1.recovery-key", "org.ai-assistant1.reseal"}
    for each in actions.values():
        assert each.findtext("defaults/allow_any") == each.findtext("defaults/allow_inactive") == "no"
    documented = " ".join(each.text for each in vault.load().methods.values())
    assert all(f"Needs {each}." in documented for each in actions)


def test_the_bus_starts_the_unit_and_the_unit_owns_the_name() -> None:
    activation = configparser.ConfigParser()
    activation.read(DATA / f"usr/share/dbus-1/system-services/{vault.BUS_NAME}.service")
    assert activation["D-BUS Service"]["Name"] == vault.BUS_NAME
    assert activation["D-BUS Service"]["SystemdService"] == UNIT.name
    lines = UNIT.read_text().splitlines()
    assert f"BusName={vault.BUS_NAME}" in lines
    policy = ElementTree.parse(DATA / f"usr/share/dbus-1/system.d/{vault.BUS_NAME}.conf")
    owners = {each.get("user") for each in policy.findall("policy") if each.find("allow[@own]") is not None}
    assert owners == {"root"}


def test_the_unit_may_do_what_it_must_and_no_more() -> None:
    lines = UNIT.read_text().splitlines()
    assert {"CapabilityBoundingSet=", "ProtectSystem=strict", "PrivateDevices=yes", "PrivateNetwork=yes"} <= set(lines)
    assert {"LimitCORE=0", "MemorySwapMax=0"} <= set(lines)
    (writable,) = (line.removeprefix("ReadWritePaths=").split() for line in lines if line.startswith("ReadWritePaths="))
    assert writable == [f"-/{recovery.FOLDER}", f"-/{storage.FOLDER}"]
    rules = (DATA / "usr/lib/tmpfiles.d/ai-assistant-vault.conf").read_text().splitlines()
    modes = {line.split()[1]: line.split()[2] for line in rules if line.startswith("d ")}
    assert modes == {f"/{storage.FOLDER}": "0755", f"/{recovery.FOLDER}": "0700"}


def test_what_the_console_shows_is_for_root_alone() -> None:
    # While a recovery key waits, the banner has it.
    banner = (CHECKOUT / "image/base/usr/lib/systemd/system/ai-assistant-banner.service").read_text()
    (start,) = (line for line in banner.splitlines() if line.startswith("ExecStart="))
    assert start.index("umask 077") < start.index("ai-assistant banner")


def test_the_image_gets_all_of_it() -> None:
    assert '("daemon", "tee")' in (CHECKOUT / "image/stage.py").read_text()
