"""Replies as sentences, in English and Chinese.

Every renderer takes the first value of the reply (plain Python, variants unwrapped), the action's
arguments and whether to answer in Chinese. Replies come from other processes: what is missing or null
there is said to be unknown, never filled in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

Arguments = Mapping[str, str]
MAX_LINES = 40


def _say(zh: bool, english: str, chinese: str) -> str:
    return chinese if zh else english


def _named(reply: Any) -> Mapping[str, Any]:
    """Raises TypeError, which the caller turns into a named error, for a reply that is no dictionary."""
    if not isinstance(reply, Mapping):
        raise TypeError(f"not a dictionary: {type(reply).__name__}")
    return reply


def _listed(reply: Any) -> Sequence[Any]:
    """The same for a list: an answer that is not understood must not look like an empty list."""
    if not isinstance(reply, list):
        raise TypeError(f"not a list: {type(reply).__name__}")
    return reply


def _word(reply: Any) -> str:
    if not isinstance(reply, str):
        raise TypeError(f"not a string: {type(reply).__name__}")
    return reply


def _number(values: Any, key: str) -> float | None:
    value = _named(values).get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(values: Any, key: str) -> str:
    value = _named(values).get(key)
    return value if isinstance(value, str) else ""


def _size(count: float) -> str:
    """Bytes for people: binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB" if count < 1024 else f"{count / 1024:.1f} TiB"


def _duration(seconds: float, zh: bool) -> str:
    minutes = int(seconds // 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    parts = [(days, "day", "天"), (hours, "hour", "小时"), (minutes, "minute", "分钟")]
    shown = [each for each in parts if each[0]][:2] or [(int(seconds), "second", "秒")]
    if zh:
        return " ".join(f"{count} {chinese}" for count, _, chinese in shown)
    return " ".join(f"{count} {english}{'' if count == 1 else 's'}" for count, english, _ in shown)


def _unknown(zh: bool, english: str, chinese: str) -> str:
    return _say(zh, f"Nothing on this machine measures the {english}.", f"这台机器没有可以测量{chinese}的传感器。")


def status(reply: Any, arguments: Arguments, zh: bool) -> str:
    state = _text(reply, "state") or "?"
    lines = [_say(zh, f"The appliance is {state}.", f"系统状态：{state}。")]
    for one in (uptime, load, memory, disk):
        lines.append(one(reply, arguments, zh))
    if _number(reply, "temperature_c") is not None:
        lines.append(temperature(reply, arguments, zh))
    if _number(reply, "watts") is not None:
        lines.append(watts(reply, arguments, zh))
    return "\n".join(lines)


def temperature(reply: Any, arguments: Arguments, zh: bool) -> str:
    value = _number(reply, "temperature_c")
    if value is None:
        return _unknown(zh, "temperature", "温度")
    return _say(zh, f"The hottest sensor of the processor reads {value:.0f} °C.", f"处理器最高温度为 {value:.0f} °C。")


def watts(reply: Any, arguments: Arguments, zh: bool) -> str:
    value = _number(reply, "watts")
    if value is None:
        return _unknown(zh, "power consumption", "功耗")
    source = _text(reply, "watts_source") or "?"
    return _say(
        zh, f"It draws {value:.1f} W (measured by {source}).", f"当前功耗为 {value:.1f} W（由 {source} 测得）。"
    )


def disk(reply: Any, arguments: Arguments, zh: bool) -> str:
    return _room(reply, "disk_total_bytes", "disk_free_bytes", zh, "on the disk", "磁盘", "disk space", "磁盘空间")


def memory(reply: Any, arguments: Arguments, zh: bool) -> str:
    return _room(reply, "memory_total_bytes", "memory_available_bytes", zh, "of memory", "内存", "memory", "内存")


def _room(reply: Any, total: str, free: str, zh: bool, where: str, wo: str, what: str, was: str) -> str:
    all_of_it, left = _number(reply, total), _number(reply, free)
    if all_of_it is None or left is None or all_of_it <= 0:
        return _unknown(zh, what, was)
    share = 100 * (1 - left / all_of_it)
    return _say(
        zh,
        f"{_size(left)} of {_size(all_of_it)} {where} are free ({share:.0f} % used).",
        f"{wo}剩余 {_size(left)}，共 {_size(all_of_it)}（已用 {share:.0f} %）。",
    )


def uptime(reply: Any, arguments: Arguments, zh: bool) -> str:
    value = _number(reply, "uptime_s")
    if value is None:
        return _unknown(zh, "uptime", "运行时间")
    return _say(zh, f"It has been running for {_duration(value, zh)}.", f"已运行 {_duration(value, zh)}。")


def address(reply: Any, arguments: Arguments, zh: bool) -> str:
    found = _named(reply).get("addresses")
    shown = [str(each) for each in found] if isinstance(found, Sequence) and not isinstance(found, str) else []
    if not shown:
        return _say(zh, "It has no network address.", "没有网络地址。")
    return _say(zh, f"Its address is {', '.join(shown)}.", f"网络地址：{'、'.join(shown)}。")


def version(reply: Any, arguments: Arguments, zh: bool) -> str:
    value = _text(reply, "version") or "?"
    return _say(zh, f"AI Assistant OS {value}.", f"AI Assistant OS 版本 {value}。")


def cpu(reply: Any, arguments: Arguments, zh: bool) -> str:
    name, cores = _text(reply, "cpu"), _number(reply, "cores")
    if not name and cores is None:
        return _say(zh, "The processor does not tell its name.", "处理器没有提供型号信息。")
    count = "?" if cores is None else f"{cores:.0f}"
    return _say(zh, f"{name or 'Unknown processor'}, {count} cores.", f"{name or '未知处理器'}，{count} 个核心。")


def load(reply: Any, arguments: Arguments, zh: bool) -> str:
    value, cores = _number(reply, "load_1m"), _number(reply, "cores")
    if value is None:
        return _unknown(zh, "load", "负载")
    of = f" / {cores:.0f}" if cores else ""
    return _say(
        zh,
        f"The load of the last minute is {value:.2f}{of and f' on {cores:.0f} cores'}.",
        f"最近一分钟的平均负载为 {value:.2f}{of and f'（{cores:.0f} 个核心）'}。",
    )


def running(reply: Any, arguments: Arguments, zh: bool) -> str:
    value = _number(reply, "running")
    if value is None:
        return _say(zh, "The service does not say what is running.", "服务没有说明正在运行的请求。")
    if value == 0:
        return _say(zh, "Nothing is being generated.", "当前没有正在运行的生成。")
    count = int(value)
    return _say(zh, f"{count} generation{'' if count == 1 else 's'} running.", f"有 {count} 个生成正在运行。")


def image_profile(reply: Any, arguments: Arguments, zh: bool) -> str:
    value = _text(reply, "profile")
    if value in ("", "unknown"):
        return _say(zh, "The image does not say of which kind it is.", "镜像没有说明自己的类型。")
    words = {"developer": "开发版", "production": "生产版", "test": "测试版"}
    return _say(zh, f"This is the {value} image.", f"这是{words.get(value, value)}镜像。")


def hostname(reply: Any, arguments: Arguments, zh: bool) -> str:
    name = _word(reply)
    return _say(zh, f"It is called {name}.", f"主机名是 {name}。")


def hardware(reply: Any, arguments: Arguments, zh: bool) -> str:
    shown = " ".join(each for each in (_text(reply, "HardwareVendor"), _text(reply, "HardwareModel")) if each)
    if not shown:
        return _say(zh, "The machine does not tell its maker and model.", "机器没有提供厂商和型号信息。")
    return _say(zh, f"It is a {shown}.", f"硬件：{shown}。")


def kernel(reply: Any, arguments: Arguments, zh: bool) -> str:
    system = _text(reply, "OperatingSystemPrettyName") or "?"
    core = " ".join(each for each in (_text(reply, "KernelName"), _text(reply, "KernelRelease")) if each) or "?"
    return _say(zh, f"{system}, kernel {core}.", f"{system}，内核 {core}。")


def time(reply: Any, arguments: Arguments, zh: bool) -> str:
    now = _number(reply, "TimeUSec")
    zone = _text(reply, "Timezone")
    if now is None:
        return _say(zh, "The clock service does not tell the time.", "时间服务没有给出时间。")
    moment, shown = datetime.fromtimestamp(now / 1e6, UTC), "UTC"
    try:
        from zoneinfo import ZoneInfo

        moment, shown = moment.astimezone(ZoneInfo(zone)), zone
    except (KeyError, ValueError, OSError):
        # Without time zone data here, UTC is right if said so.
        pass
    if zh:
        return f"现在是 {moment:%Y-%m-%d %H:%M}，星期{'一二三四五六日'[moment.weekday()]}（{shown}）。"
    return f"It is {moment:%H:%M on %A, %d %B %Y} ({shown})."


def timezone(reply: Any, arguments: Arguments, zh: bool) -> str:
    value = _word(reply) or "UTC"
    return _say(zh, f"The time zone is {value}.", f"时区是 {value}。")


def clock_sync(reply: Any, arguments: Arguments, zh: bool) -> str:
    on, done = (bool(_named(reply).get(key)) for key in ("NTP", "NTPSynchronized"))
    if done:
        return _say(zh, "The clock is synchronised over the network.", "时钟已通过网络同步。")
    if on:
        return _say(
            zh, "Synchronisation is on, but the clock is not synchronised yet.", "时间同步已开启，但尚未完成同步。"
        )
    return _say(zh, "Clock synchronisation is off.", "时间同步已关闭。")


def boot_duration(reply: Any, arguments: Arguments, zh: bool) -> str:
    end = _number(reply, "FinishTimestampMonotonic")
    if not end:
        return _say(zh, "The start is not finished yet.", "启动尚未完成。")
    # Monotonic time starts with the kernel; firmware and loader report how long before that they began.
    before = _number(reply, "FirmwareTimestampMonotonic") or 0.0
    return _say(zh, f"The start took {(end + before) / 1e6:.1f} seconds.", f"启动用了 {(end + before) / 1e6:.1f} 秒。")


def failed_units(reply: Any, arguments: Arguments, zh: bool) -> str:
    names = [str(each[0]) for each in _listed(reply)]
    if not names:
        return _say(zh, "No service has failed.", "没有失败的服务。")
    return _say(zh, f"{len(names)} failed: {', '.join(names)}.", f"{len(names)} 个失败：{'、'.join(names)}。")


def sessions(reply: Any, arguments: Arguments, zh: bool) -> str:
    # (session, user id, user, seat, path)
    users = sorted({str(each[2]) for each in _listed(reply)})
    if not users:
        return _say(zh, "Nobody is logged in.", "没有用户登录。")
    return _say(zh, f"Logged in: {', '.join(users)}.", f"已登录：{'、'.join(users)}。")


def self_test(reply: Any, arguments: Arguments, zh: bool) -> str:
    results = [(str(name), bool(good), str(detail)) for name, good, detail in _listed(reply)]
    bad = sum(not good for _, good, _ in results)
    head = _say(zh, "Everything passed.", "全部通过。") if not bad else _say(zh, f"{bad} failed.", f"{bad} 项未通过。")
    return "\n".join([head, *(f"{'✓' if good else '✗'} {name}: {detail}" for name, good, detail in results)])


def log(reply: Any, arguments: Arguments, zh: bool) -> str:
    lines = [str(each) for each in _listed(reply)][-MAX_LINES:]
    return "\n".join(lines) or _say(zh, "The log has no such entries.", "日志中没有这样的条目。")


def list_models(reply: Any, arguments: Arguments, zh: bool) -> str:
    if not _listed(reply):
        return _say(zh, "There are no models.", "没有模型。")
    lines = [
        f"{_text(each, 'Name')}  {_size(_number(each, 'SizeBytes') or 0)}  {_text(each, 'State')}"
        for each in reply[:MAX_LINES]
    ]
    count = len(reply)
    return "\n".join([_say(zh, f"{count} model{'' if count == 1 else 's'}:", f"共 {count} 个模型："), *lines])


def loaded_models(reply: Any, arguments: Arguments, zh: bool) -> str:
    names = [_text(each, "Name") for each in _listed(reply) if _text(each, "State") == "loaded"]
    if not names:
        return _say(zh, "No model is in memory.", "内存中没有模型。")
    return _say(zh, f"In memory: {', '.join(names)}.", f"已加载：{'、'.join(names)}。")


def model_info(reply: Any, arguments: Arguments, zh: bool) -> str:
    parameters = _number(reply, "Parameters") or 0
    parts = [
        _text(reply, "Name"),
        _text(reply, "State"),
        _size(_number(reply, "SizeBytes") or 0),
        f"{_text(reply, 'Format')} {_text(reply, 'Architecture')} {_text(reply, 'Quantization')}".strip(),
        _say(zh, f"{parameters / 1e6:.1f} M parameters", f"{parameters / 1e6:.1f} M 参数"),
        _say(
            zh,
            f"context {_number(reply, 'ContextLength') or 0:.0f}",
            f"上下文 {_number(reply, 'ContextLength') or 0:.0f}",
        ),
        _say(zh, "needs about ", "约需内存 ") + _size(_number(reply, "MemoryEstimateBytes") or 0),
    ]
    error = _text(reply, "Error")
    return ", ".join(each for each in parts if each) + (f" ({error})" if error else "")


def power_profile(reply: Any, arguments: Arguments, zh: bool) -> str:
    name = _word(reply)
    return _say(zh, f"The power profile is {name}.", f"电源模式是 {_profile(name)}。")


def _profile(name: str) -> str:
    words = {"power-saver": "省电", "balanced": "平衡", "performance": "性能"}
    return f"{words[name]}（{name}）" if name in words else name


def update_check(reply: Any, arguments: Arguments, zh: bool) -> str:
    """The reply is the newest version that can be installed, or "" when there is none."""
    new = _word(reply)
    if not new:
        return _say(zh, "There is no update.", "没有可用的更新。")
    return _say(zh, f"Version {new} can be installed.", f"可以安装新版本 {new}。")


def help_text(reply: Any, arguments: Arguments, zh: bool) -> str:
    """The reply is the list of what each action does, in the wanted language."""
    head = _say(zh, "You can ask me to:", "你可以让我：")
    return "\n".join([head, *(f"- {each}" for each in reply)])


def load_model(reply: Any, arguments: Arguments, zh: bool) -> str:
    return _say(zh, f"{arguments['model']} is loaded.", f"{arguments['model']} 已加载。")


def unload_model(reply: Any, arguments: Arguments, zh: bool) -> str:
    return _say(zh, f"{arguments['model']} is no longer in memory.", f"{arguments['model']} 已从内存中移出。")


def remove_model(reply: Any, arguments: Arguments, zh: bool) -> str:
    return _say(zh, f"{arguments['model']} is deleted.", f"{arguments['model']} 已删除。")


def set_power_profile(reply: Any, arguments: Arguments, zh: bool) -> str:
    name = arguments["profile"]
    return _say(zh, f"The power profile is now {name}.", f"电源模式已切换为 {_profile(name)}。")


def set_timezone(reply: Any, arguments: Arguments, zh: bool) -> str:
    return _say(zh, f"The time zone is now {arguments['zone']}.", f"时区已设为 {arguments['zone']}。")


def set_clock_sync(reply: Any, arguments: Arguments, zh: bool) -> str:
    on = arguments["state"] == "on"
    return _say(zh, f"Clock synchronisation is now {'on' if on else 'off'}.", f"时间同步已{'开启' if on else '关闭'}。")


def reboot(reply: Any, arguments: Arguments, zh: bool) -> str:
    return _say(zh, "The machine restarts now.", "机器正在重启。")


def power_off(reply: Any, arguments: Arguments, zh: bool) -> str:
    return _say(zh, "The machine switches itself off now.", "机器正在关机。")
