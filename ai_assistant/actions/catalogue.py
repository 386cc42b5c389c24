"""Everything that a sentence can make the appliance do, as one ordered list of plain data.

An action is a D-Bus call on a service that exists anyway, and a function that turns the reply into a
sentence. The built-in model is trained on this list: `fingerprint` changes when it must be trained again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ai_assistant.actions import render

NONE = "none"
"""What the model answers when no action fits. It is no action."""

OURS = "org.ai_assistant1"
ROOT = "/org/ai_assistant1"
PROPERTIES = "org.freedesktop.DBus.Properties"


class Effect(StrEnum):
    READ = "read"
    CHANGE = "change"
    """Needs the person's consent before it is done."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A named choice: either fixed `values`, or the names of a `live` kind (``model``, ``zone``)."""

    name: str
    values: tuple[str, ...] = ()
    live: str = ""


@dataclass(frozen=True, slots=True)
class Value:
    """Stands in a call for the value of a parameter, translated where the service has another word for it."""

    parameter: str
    words: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Typed:
    """A D-Bus variant: its signature and what is in it (may be a `Value`)."""

    signature: str
    value: Any


@dataclass(frozen=True, slots=True)
class Service:
    """A bus name, its main object, and what to call it when nobody owns the name."""

    name: str
    path: str
    english: str
    chinese: str


@dataclass(frozen=True, slots=True)
class Call:
    """One method call; everything after `arguments` says what surrounds it.

    Attributes:
        model: the parameter that names a model: the call goes to that model's object (Manager.FindModel).
        each: the reply is a list of object paths, and what counts are the properties of this interface on each.
        job: the reply is the path of a Job, which is waited for.
    """

    service: Service
    interface: str
    member: str
    signature: str = ""
    arguments: tuple[Any, ...] = ()
    model: str = ""
    each: str = ""
    job: bool = False


Renderer = Callable[[Any, Mapping[str, str], bool], str]
"""(first value of the reply, arguments, whether in Chinese) -> a sentence."""


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to ask for.

    `english` and `chinese` are what it does, as an order, with parameters in braces. Without a call, the
    catalogue itself is what is rendered.
    """

    name: str
    english: str
    chinese: str
    render: Renderer
    call: Call | None = None
    parameters: tuple[Parameter, ...] = ()
    effect: Effect = Effect.READ

    def describe(self, arguments: Mapping[str, str], *, chinese: bool) -> str:
        """What it does, with these values; parameters without one are named."""
        named = {each.name: arguments.get(each.name, f"<{each.name}>") for each in self.parameters}
        return (self.chinese if chinese else self.english).format(**named)


MANAGER = Service(OURS, ROOT, "AI Assistant service", "AI 助手服务")
LOGIN = Service("org.freedesktop.login1", "/org/freedesktop/login1", "login service", "登录管理服务")
HOST = Service("org.freedesktop.hostname1", "/org/freedesktop/hostname1", "host name service", "主机名服务")
CLOCK = Service("org.freedesktop.timedate1", "/org/freedesktop/timedate1", "time and date service", "时间日期服务")
SYSTEMD = Service("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "service manager", "系统服务管理器")
PROFILES = Service(
    "org.freedesktop.UPower.PowerProfiles",
    "/org/freedesktop/UPower/PowerProfiles",
    "power profile service",
    "电源模式服务",
)
UPDATE = Service("org.ai_assistant1.Update", ROOT, "update service", "更新服务")

MODEL = Parameter("model", live="model")
ZONE = Parameter("zone", live="zone")
PRIORITY = Parameter("priority", ("all", "warning", "err"))
PROFILE = Parameter("profile", ("power-saver", "balanced", "performance"))
SWITCH = Parameter("state", ("on", "off"))

_MODEL_INTERFACE = "org.ai_assistant1.Model"
_MANAGER_INTERFACE = "org.ai_assistant1.Manager"
_STATUS = Call(MANAGER, _MANAGER_INTERFACE, "GetStatus")
_MODELS = Call(MANAGER, _MANAGER_INTERFACE, "ListModels", each=_MODEL_INTERFACE)


def _all(service: Service, interface: str) -> Call:
    return Call(service, PROPERTIES, "GetAll", "s", (interface,))


def _get(service: Service, interface: str, name: str) -> Call:
    return Call(service, PROPERTIES, "Get", "ss", (interface, name))


def _model(member: str, signature: str = "", arguments: tuple[Any, ...] = (), *, job: bool = False) -> Call:
    return Call(MANAGER, _MODEL_INTERFACE, member, signature, arguments, model="model", job=job)


ACTIONS: tuple[Action, ...] = (
    Action("status", "show how the machine is doing", "查看整体状态", render.status, _STATUS),
    Action("temperature", "show the temperature", "查看温度", render.temperature, _STATUS),
    Action("watts", "show the power consumption", "查看功耗", render.watts, _STATUS),
    Action("disk", "show the disk space", "查看磁盘空间", render.disk, _STATUS),
    Action("memory", "show the memory", "查看内存", render.memory, _STATUS),
    Action("uptime", "show how long the machine has been running", "查看运行时间", render.uptime, _STATUS),
    Action("address", "show the network addresses", "查看网络地址", render.address, _STATUS),
    Action("version", "show the version of the software", "查看软件版本", render.version, _STATUS),
    Action("cpu", "show the processor", "查看处理器", render.cpu, _STATUS),
    Action("load", "show how busy the processor is", "查看负载", render.load, _STATUS),
    Action("running", "show how many generations are running", "查看正在运行的请求", render.running, _STATUS),
    Action("image_profile", "show which kind of image this is", "查看镜像类型", render.image_profile, _STATUS),
    Action("hostname", "show the host name", "查看主机名", render.hostname,
           _get(HOST, HOST.name, "Hostname")),
    Action("hardware", "show the maker and model of the machine", "查看硬件型号", render.hardware,
           _all(HOST, HOST.name)),
    Action("kernel", "show the operating system and kernel", "查看操作系统和内核", render.kernel,
           _all(HOST, HOST.name)),
    Action("time", "show the time and date", "查看时间和日期", render.time,
           _all(CLOCK, CLOCK.name)),
    Action("timezone", "show the time zone", "查看时区", render.timezone,
           _get(CLOCK, CLOCK.name, "Timezone")),
    Action("clock_sync", "show whether the clock is synchronised", "查看时间同步", render.clock_sync,
           _all(CLOCK, CLOCK.name)),
    Action("boot_duration", "show how long the start took", "查看启动用时", render.boot_duration,
           _all(SYSTEMD, "org.freedesktop.systemd1.Manager")),
    Action("failed_units", "list the services that failed", "列出失败的服务", render.failed_units,
           Call(SYSTEMD, "org.freedesktop.systemd1.Manager", "ListUnitsFiltered", "as", (("failed",),))),
    Action("sessions", "list who is logged in", "列出登录的用户", render.sessions,
           Call(LOGIN, "org.freedesktop.login1.Manager", "ListSessions")),
    Action("self_test", "run a self-test", "运行自检", render.self_test,
           Call(MANAGER, _MANAGER_INTERFACE, "SelfTest")),
    Action("log", "show the log (which: {priority})", "查看日志（级别：{priority}）", render.log,
           Call(MANAGER, _MANAGER_INTERFACE, "GetLog", "us", (20, Value("priority", {"all": "info"}))), (PRIORITY,)),
    Action("list_models", "list the models", "列出模型", render.list_models, _MODELS),
    Action("loaded_models", "list the models in memory", "列出已加载的模型", render.loaded_models, _MODELS),
    Action("model_info", "describe the model {model}", "介绍模型 {model}", render.model_info,
           Call(MANAGER, PROPERTIES, "GetAll", "s", (_MODEL_INTERFACE,), model="model"), (MODEL,)),
    Action("power_profile", "show the power profile", "查看电源模式", render.power_profile,
           _get(PROFILES, PROFILES.name, "ActiveProfile")),
    Action("update_check", "check for updates", "检查更新", render.update_check,
           Call(UPDATE, UPDATE.name, "Check")),
    Action("help", "say what can be asked for", "说明能做什么", render.help_text),
    Action("load_model", "load the model {model} into memory", "加载模型 {model}", render.load_model,
           _model("Load", "a{sv}", ({},), job=True), (MODEL,), Effect.CHANGE),
    Action("unload_model", "take the model {model} out of memory", "卸载模型 {model}", render.unload_model,
           _model("Unload"), (MODEL,), Effect.CHANGE),
    Action("remove_model", "delete the model {model} from the disk", "从磁盘删除模型 {model}", render.remove_model,
           _model("Remove"), (MODEL,), Effect.CHANGE),
    Action("set_power_profile", "switch the power profile to {profile}", "把电源模式切换为 {profile}",
           render.set_power_profile,
           Call(PROFILES, PROPERTIES, "Set", "ssv",
                (PROFILES.name, "ActiveProfile", Typed("s", Value("profile")))), (PROFILE,), Effect.CHANGE),
    Action("set_timezone", "set the time zone to {zone}", "把时区设为 {zone}", render.set_timezone,
           Call(CLOCK, CLOCK.name, "SetTimezone", "sb", (Value("zone"), False)), (ZONE,), Effect.CHANGE),
    Action("set_clock_sync", "turn clock synchronisation {state}", "切换时间同步（{state}）", render.set_clock_sync,
           Call(CLOCK, CLOCK.name, "SetNTP", "bb", (Value("state", {"on": True, "off": False}), False)),
           (SWITCH,), Effect.CHANGE),
    Action("reboot", "restart the machine", "重启机器", render.reboot,
           Call(LOGIN, "org.freedesktop.login1.Manager", "Reboot", "b", (False,)), effect=Effect.CHANGE),
    Action("power_off", "switch the machine off", "关闭机器", render.power_off,
           Call(LOGIN, "org.freedesktop.login1.Manager", "PowerOff", "b", (False,)), effect=Effect.CHANGE),
)  # fmt: skip

BY_NAME: Mapping[str, Action] = {each.name: each for each in ACTIONS}


def fingerprint() -> str:
    """SHA-256 (hex) of what the model has to know: names, parameters and their fixed values."""
    known = [[each.name, [[one.name, list(one.values), one.live] for one in each.parameters]] for each in ACTIONS]
    return hashlib.sha256(json.dumps([*known, NONE], separators=(",", ":")).encode()).hexdigest()
