from __future__ import annotations

from typing import Any

import pytest

from ai_assistant.actions import perform
from ai_assistant.actions.bus import BusFailure
from ai_assistant.actions.catalogue import ACTIONS, BY_NAME, PROFILES, Typed
from ai_assistant.actions.perform import perform_action
from ai_assistant.errors import (
    AIAssistantError,
    Busy,
    Cancelled,
    InternalError,
    InvalidArgument,
    NoSpace,
    NoSuchModel,
    NotAuthorized,
    NotSupported,
    OutOfMemory,
    ServiceUnavailable,
    Timeout,
)
from tests.actions.fakes import DBUS, FakeBus, Turn

OURS = "org.ai_assistant1.Error."
MODEL = {
    "Name": "tiny:1", "State": "loaded", "SizeBytes": 3 << 20, "Format": "gguf", "Architecture": "llama",
    "Quantization": "Q8_0", "Parameters": 2_500_000, "ContextLength": 512, "MemoryEstimateBytes": 9 << 20, "Error": "",
}  # fmt: skip


async def done(bus: FakeBus, name: str, *, chinese: bool = False, **arguments: str) -> str:
    return await perform_action(bus, BY_NAME[name], arguments, chinese=chinese)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perform, "JOB_POLL_S", 0.0)


@pytest.mark.parametrize(
    ("name", "english", "chinese"),
    [
        ("watts", "It draws 12.3 W (measured by rapl).", "当前功耗为 12.3 W（由 rapl 测得）。"),
        (
            "memory",
            "4.0 GiB of 16.0 GiB of memory are free (75 % used).",
            "内存剩余 4.0 GiB，共 16.0 GiB（已用 75 %）。",
        ),
        ("uptime", "It has been running for 1 day 2 hours.", "已运行 1 天 2 小时。"),
        ("address", "Its address is 192.0.2.7.", "网络地址：192.0.2.7。"),
        ("version", "AI Assistant OS 0.1.0.", "AI Assistant OS 版本 0.1.0。"),
        ("cpu", "Example CPU, 8 cores.", "Example CPU，8 个核心。"),
        ("load", "The load of the last minute is 0.50 on 8 cores.", "最近一分钟的平均负载为 0.50（8 个核心）。"),
        ("running", "2 generations running.", "有 2 个生成正在运行。"),
        ("image_profile", "This is the developer image.", "这是开发版镜像。"),
    ],
)
async def test_answers_from_the_status(name: str, english: str, chinese: str) -> None:
    assert await done(FakeBus(), name) == english
    assert await done(FakeBus(), name, chinese=True) == chinese


async def test_the_overview_says_only_what_is_measured() -> None:
    full = await done(FakeBus(), "status")
    assert full.splitlines()[0] == "The appliance is running."
    assert "48 °C" in full
    assert "W" in full
    bare = await done(FakeBus(GetStatus={"state": "degraded", "temperature_c": None}), "status")
    assert "degraded" in bare
    assert "°C" not in bare


@pytest.mark.parametrize("name", ["temperature", "watts", "disk", "memory", "uptime", "load"])
@pytest.mark.parametrize("value", [None, "warm", True])
async def test_what_nothing_measures_is_never_invented(name: str, value: object) -> None:
    keys = ("temperature_c", "watts", "disk_total_bytes", "memory_total_bytes", "uptime_s", "load_1m")
    answer = await done(FakeBus(GetStatus=dict.fromkeys(keys, value)), name)
    assert answer.startswith("Nothing on this machine measures")
    assert "没有" in await done(FakeBus(GetStatus={}), name, chinese=True)


async def test_properties_of_system_services() -> None:
    host = {"HardwareVendor": "Maker", "HardwareModel": "Mini 1", "OperatingSystemPrettyName": "Debian 13",
            "KernelName": "Linux", "KernelRelease": "6.12"}  # fmt: skip
    clock = {"TimeUSec": 1_700_000_000_000_000, "Timezone": "UTC", "NTP": True, "NTPSynchronized": False}
    manager = {"FinishTimestampMonotonic": 4_200_000, "FirmwareTimestampMonotonic": 800_000}
    bus = FakeBus(Get="box")
    bus.answers[("GetAll", "org.freedesktop.hostname1")] = host
    bus.answers[("GetAll", "org.freedesktop.timedate1")] = clock
    bus.answers[("GetAll", "org.freedesktop.systemd1.Manager")] = manager
    assert await done(bus, "hostname") == "It is called box."
    assert await done(bus, "hardware") == "It is a Maker Mini 1."
    assert await done(bus, "kernel") == "Debian 13, kernel Linux 6.12."
    assert await done(bus, "time") == "It is 22:13 on Tuesday, 14 November 2023 (UTC)."
    assert await done(bus, "time", chinese=True) == "现在是 2023-11-14 22:13，星期二（UTC）。"
    assert "not synchronised yet" in await done(bus, "clock_sync")
    assert await done(bus, "boot_duration") == "The start took 5.0 seconds."


async def test_lists() -> None:
    unit = ("x.service", "X", "loaded", "failed", "failed", "", "/u", 0, "", "/")
    bus = FakeBus(
        ListUnitsFiltered=[list(unit)], ListSessions=[["1", 1000, "ana", "", "/s"], ["2", 1000, "ana", "", "/t"]],
        SelfTest=[["disk", True, "fine"], ["worker", False, "no answer"]], GetLog=["a", "b"],
    )  # fmt: skip
    assert await done(bus, "failed_units") == "1 failed: x.service."
    assert await done(bus, "sessions") == "Logged in: ana."
    assert await done(bus, "self_test") == "1 failed.\n✓ disk: fine\n✗ worker: no answer"
    assert await done(bus, "log", priority="all") == "a\nb"
    assert bus.calls[-1][3:] == ("GetLog", "us", (20, "info"))
    await done(bus, "log", priority="err")
    assert bus.calls[-1][5] == (20, "err")
    empty = FakeBus(ListUnitsFiltered=[], ListSessions=[], SelfTest=[], GetLog=[], ListModels=[])
    for name in ("failed_units", "sessions", "list_models", "loaded_models"):
        assert await done(empty, name)
    assert await done(empty, "log", priority="all") == "The log has no such entries."


async def test_models() -> None:
    bus = FakeBus(ListModels=["/m/1", "/m/2"], GetAll=MODEL, FindModel="/m/1", Unload=None, Remove=None)
    assert await done(bus, "list_models") == "2 models:\ntiny:1  3 MiB  loaded\ntiny:1  3 MiB  loaded"
    assert await done(bus, "loaded_models") == "In memory: tiny:1, tiny:1."
    assert await done(bus, "model_info", model="tiny:1") == (
        "tiny:1, loaded, 3 MiB, gguf llama Q8_0, 2.5 M parameters, context 512, needs about 9 MiB"
    )
    assert await done(bus, "unload_model", model="tiny:1") == "tiny:1 is no longer in memory."
    assert bus.calls[-2][3:] == ("FindModel", "s", ("tiny:1",))
    assert bus.calls[-1][1:4] == ("/m/1", "org.ai_assistant1.Model", "Unload")
    assert await done(bus, "remove_model", model="tiny:1", chinese=True) == "tiny:1 已删除。"


def job(state: str, error: tuple[str, str] = ("", "")) -> Turn:
    return Turn({"State": state, "Error": list(error)})


async def test_loading_waits_for_the_job() -> None:
    bus = FakeBus(FindModel="/m/1", Load="/j/1", GetAll=[job("queued"), job("running"), job("done")])
    assert await done(bus, "load_model", model="tiny:1") == "tiny:1 is loaded."
    assert bus.calls[-1][1] == "/j/1"


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (job("failed", (OURS + "OutOfMemory", "needs 9 GB")), OutOfMemory),
        (job("failed", (OURS + "Strange", "?")), InternalError),
        (job("cancelled"), Cancelled),
    ],
)
async def test_a_job_that_fails_is_its_own_error(end: Turn, kind: type[AIAssistantError]) -> None:
    bus = FakeBus(FindModel="/m/1", Load="/j/1", GetAll=[job("running"), end])
    with pytest.raises(kind):
        await done(bus, "load_model", model="tiny:1")


async def test_a_job_that_never_ends_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perform, "JOB_LIMIT_S", 0.0)
    bus = FakeBus(FindModel="/m/1", Load="/j/1", GetAll={"State": "running"})
    with pytest.raises(Timeout):
        await done(bus, "load_model", model="tiny:1")


async def test_settings_are_sent_as_their_services_want_them() -> None:
    bus = FakeBus(Set=None, SetTimezone=None, SetNTP=None, PowerOff=None)
    assert (
        await done(bus, "set_power_profile", profile="power-saver", chinese=True)
        == "电源模式已切换为 省电（power-saver）。"
    )
    assert bus.calls[-1][0] == PROFILES.name
    assert bus.calls[-1][3:] == ("Set", "ssv", (PROFILES.name, "ActiveProfile", Typed("s", "power-saver")))
    assert await done(bus, "set_timezone", zone="Asia/Tokyo") == "The time zone is now Asia/Tokyo."
    assert bus.calls[-1][3:] == ("SetTimezone", "sb", ("Asia/Tokyo", False))
    assert await done(bus, "set_clock_sync", state="off") == "Clock synchronisation is now off."
    assert bus.calls[-1][3:] == ("SetNTP", "bb", (False, False))
    assert await done(bus, "power_off") == "The machine switches itself off now."


async def test_help_lists_every_action() -> None:
    answer = await done(FakeBus(), "help")
    assert len(answer.splitlines()) == len(ACTIONS) + 1
    assert "重启机器" in await done(FakeBus(), "help", chinese=True)


@pytest.mark.parametrize("action", [each for each in ACTIONS if each.call], ids=lambda each: each.name)
async def test_a_service_that_nobody_provides_is_said_to_be_missing(action: Any) -> None:
    bus = FakeBus()
    bus.answers = {}
    arguments = {each.name: (each.values or ("tiny:1",))[0] for each in action.parameters}
    for chinese in (False, True):
        with pytest.raises((NotSupported, ServiceUnavailable)) as caught:
            await perform_action(bus, action, arguments, chinese=chinese)
        assert isinstance(caught.value, ServiceUnavailable) == (action.call.service.name == "org.ai_assistant1")
        assert (action.call.service.chinese if chinese else action.call.service.english) in caught.value.message


async def test_the_missing_power_profile_service_is_named() -> None:
    with pytest.raises(NotSupported, match="this image has no power profile service"):
        await done(FakeBus(), "power_profile")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (OURS + "NoSuchModel", NoSuchModel),
        (OURS + "NoSpace", NoSpace),
        (OURS + "Busy", Busy),
        (DBUS + "AccessDenied", NotAuthorized),
        (DBUS + "InteractiveAuthorizationRequired", NotAuthorized),
        (DBUS + "UnknownMethod", NotSupported),
        (DBUS + "NoReply", Timeout),
        (DBUS + "Disconnected", ServiceUnavailable),
        (DBUS + "InvalidArgs", InvalidArgument),
        ("com.example.Odd", InternalError),
        ("", InternalError),
    ],
)
async def test_errors_of_services_become_named_errors(name: str, kind: type[AIAssistantError]) -> None:
    bus = FakeBus(FindModel="/m/1", Unload=BusFailure(name, "the reason (hint: try this)"))
    with pytest.raises(kind) as caught:
        await done(bus, "unload_model", model="tiny:1")
    if name.startswith(OURS):
        assert (caught.value.message, caught.value.hint) == ("the reason", "try this")


@pytest.mark.parametrize("reply", [None, 7, "text", [1, 2], [[]]])
async def test_replies_of_another_shape_are_errors(reply: object) -> None:
    bus = FakeBus(SelfTest=reply, ListUnitsFiltered=reply, ListSessions=reply, GetStatus=reply, GetAll=reply)
    for name in ("self_test", "failed_units", "sessions", "status", "temperature", "kernel", "time", "hardware"):
        with pytest.raises(InternalError, match="not understood"):
            await done(bus, name)
