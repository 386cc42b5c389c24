"""Where a backend that nobody vouches for runs: a process that gives up what it needs not, and then loads the backend.

    python -m ai_assistant.hal.confine SOCKET LIFELINE MEMORY_BYTES FOLDER

The order matters. Everything is given up while the process has one thread and has loaded none of the backend's code,
and what could be given up is told to the parent before the backend can say anything. So this module imports only the
standard library: NumPy's threads would not be confined.

Kept from it: other processes (no fork, no exec, no signal, no ptrace), every new socket, privileges and capabilities,
writing files outside /dev, reading files outside system folders, Python's own and the backend's folder, core dumps, and
more memory than it was given. Not kept from it: the devices in /dev that its user may open, system calls in general,
the time of a processor, and the memory that its parent shares with it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

READABLE = ("/usr", "/lib", "/lib64", "/bin", "/etc", "/opt", "/nix", "/sys", "/proc")
DEVICES = "/dev"

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 4, 22, 24, 38
_F_SETSIG = 10
_CAPABILITY_VERSION_3 = 0x20080522


def confine(lifeline: int, memory_bytes: int, folders: Sequence[str]) -> dict[str, str]:
    """Give up whatever this process may not keep.

    Args:
        lifeline: the reading end of a pipe that the parent holds: the kernel kills this process when it closes.
        memory_bytes: of private writable memory; 0: no limit.
        folders: may be read besides the system's.

    Returns what was done, each with "yes" or why not.
    """
    steps = {
        "ends with its parent": lambda: _end_with(lifeline),
        "limits": lambda: _limits(memory_bytes),
        "no capabilities": _no_capabilities,
        "no new privileges": lambda: _prctl(_PR_SET_NO_NEW_PRIVS, 1),
        "files": lambda: _files(folders),
        "no network, no processes": _system_calls,
    }
    done = {}
    for name, step in steps.items():
        try:
            step()
            done[name] = "yes"
        except OSError as error:
            done[name] = error.strerror or str(error)
    return done


def _prctl(option: int, *values: int) -> None:
    arguments = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *arguments) != 0:
        raise _error()


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _end_with(lifeline: int) -> None:
    # Not PR_SET_PDEATHSIG: that one fires when the parent's thread ends, and any thread may open a device.
    fcntl.fcntl(lifeline, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def _limits(memory_bytes: int) -> None:
    _prctl(_PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), min(hard, 1024)))
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    # When memory runs out all the same, this process goes first.
    Path("/proc/self/oom_score_adj").write_text("1000")


def _no_capabilities() -> None:
    for number in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0) != 0:
            break  # past the last one; or not privileged, and then there is nothing to lose
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, bytes(24)) != 0:
        raise _error()


# ------------------------------------------------------------------------------------------------- files: Landlock

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_LANDLOCK_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
"""Version of the kernel's interface → the rights that it knows: later ones add what does not matter here."""
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_SCOPES = 3  # abstract sockets and signals, from version 6


def _files(folders: Sequence[str]) -> None:
    version = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise OSError(errno.ENOSYS, "this kernel has no Landlock")
    attributes = struct.pack("=QQQ", _LANDLOCK_RIGHTS[min(version, 3)], 0, _SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    if rules < 0:
        raise _error()
    try:
        for folder in (*READABLE, *folders):
            _allow(rules, folder, _EXECUTE | _READ_FILE | _READ_DIR)
        _allow(rules, DEVICES, _READ_FILE | _READ_DIR | _WRITE_FILE)
        if _libc.syscall(_RESTRICT_SELF, rules, 0) != 0:
            raise _error()
    finally:
        os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what is not there cannot be read
    try:
        if not Path(path).is_dir():
            rights &= ~_READ_DIR
        if _libc.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", rights, folder), 0) != 0:
            raise _error()
    finally:
        os.close(folder)


# -------------------------------------------------------------------------------------------- system calls: seccomp

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOWED, _DENIED, _UNKNOWN, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_CLONE_THREAD = 0x10000
_X32 = 0x40000000

_X86_64 = {
    "clone": 56, "clone3": 435, "kill": 62, "tgkill": 234,
    "socket": 41, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "ptrace": 101, "tkill": 200,
    "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_send_signal": 424, "pidfd_getfd": 438,
    "process_vm_readv": 310, "process_vm_writev": 311, "io_uring_setup": 425, "bpf": 321, "perf_event_open": 298,
    "userfaultfd": 323, "unshare": 272, "setns": 308, "add_key": 248, "request_key": 249, "keyctl": 250,
}  # fmt: skip
_AARCH64 = {
    "clone": 220, "clone3": 435, "kill": 129, "tgkill": 131,
    "socket": 198, "execve": 221, "execveat": 281, "ptrace": 117, "tkill": 130,
    "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "pidfd_send_signal": 424, "pidfd_getfd": 438,
    "process_vm_readv": 270, "process_vm_writev": 271, "io_uring_setup": 425, "bpf": 280, "perf_event_open": 241,
    "userfaultfd": 282, "unshare": 97, "setns": 268, "add_key": 217, "request_key": 218, "keyctl": 219,
}  # fmt: skip
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}


def _step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def _filter(architecture: int, numbers: dict[str, int], pid: int) -> list[bytes]:
    """A filter's instructions. Jumps count the instructions that are left out."""
    steps = [_step(_LOAD, _ARCHITECTURE), _step(_EQUAL, architecture, 1, 0), _step(_RETURN, _KILL)]
    steps += [_step(_LOAD, _NUMBER), _step(_AT_LEAST, _X32, 0, 1), _step(_RETURN, _DENIED)]
    rest = dict(numbers)
    # The C library takes clone when the kernel seems to lack clone3, whose flags a filter cannot see.
    steps += [_step(_EQUAL, rest.pop("clone3"), 0, 1), _step(_RETURN, _UNKNOWN)]
    for name, test, value in (("clone", _ANY_BIT, _CLONE_THREAD), ("kill", _EQUAL, pid), ("tgkill", _EQUAL, pid)):
        steps += [_step(_EQUAL, rest.pop(name), 0, 4), _step(_LOAD, _FIRST_ARGUMENT)]
        steps += [_step(test, value, 0, 1), _step(_RETURN, _ALLOWED), _step(_RETURN, _DENIED)]
    for number in rest.values():
        steps += [_step(_EQUAL, number, 0, 1), _step(_RETURN, _DENIED)]
    return [*steps, _step(_RETURN, _ALLOWED)]


def _system_calls() -> None:
    machine = _MACHINES.get(os.uname().machine)
    if machine is None or sys.byteorder != "little":
        raise OSError(errno.ENOSYS, f"no filter is written for {os.uname().machine}")
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise OSError(errno.EBUSY, "there are threads already, which the filter would not bind")
    steps = _filter(*machine, os.getpid())
    code = ctypes.create_string_buffer(b"".join(steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(program))


def main() -> None:
    connection, lifeline, memory_bytes, folder = sys.argv[1:5]
    folders = [each for each in (*sys.path, sys.prefix, sys.base_prefix, folder) if each]
    done = confine(int(lifeline), int(memory_bytes), folders)
    from ai_assistant.hal.remote.child import serve

    serve(int(connection), done)


if __name__ == "__main__":
    main()
