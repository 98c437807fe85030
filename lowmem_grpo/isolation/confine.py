"""What a child process may touch: its own directory, no network, no process but its own children.

    processes, network   namespaces of its own (user_namespaces(7), pid_namespaces(7)): what the
                         child starts ends with it, whatever it did to its session; it can signal
                         no other process, and has no network
    sockets              seccomp(2), where it has no network: none to a path either, behind which
                         there may be a service of the machine
    files                Landlock (landlock(7)): it reads what its user may read, and writes below
                         the directories that it was given
    memory               RLIMIT_AS, of each process
    number of processes  RLIMIT_NPROC, of its namespaces; root is exempt from it

All of it needs Linux and no privileges. A kernel, or its administrator, may not have one of them;
then the child runs without, and whoever started it is told what is missing.

Left out: reading files and what /proc tells of other processes, and changing modes and times of
files. A machine of its own would be a stronger wall.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import select
import shutil
import signal
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Limits", "confine", "end_others", "enter_namespaces"]

_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
# The same numbers on every architecture: system calls of 2021.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
# landlock.h: the rights that change something, by the version of the interface that brought them.
_WRITE_RIGHTS = {
    1: (1 << 1) | sum(1 << bit for bit in range(4, 13)),  # write, remove, make
    2: 1 << 13,  # refer: rename and link across directories
    3: 1 << 14,  # truncate
}
_FILE_RIGHTS = (1 << 1) | (1 << 14)
_SCOPES = 0b11  # version 6: abstract sockets and signals stay inside
# linux/bpf_common.h, seccomp.h, audit.h
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERRNO, _FILTER, _PR_SET_SECCOMP = 0x7FFF0000, 0x00050000, 2, 22
_IO_URING_SETUP = 425
_SECCOMP = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
_MOST_PROCESSES = 256
_MOST_FILE_BYTES = 2**30

_alone = False
"""Whether this process has a namespace of its own."""


@dataclass(frozen=True)
class Limits:
    """What a child may use. memory_bytes: address space of each process. network: whether it has
    one. writable: directories, besides its own.
    """

    memory_bytes: int = 4 * 2**30
    network: bool = False
    writable: tuple[str, ...] = ()


def enter_namespaces(network: bool, directory: str) -> list[str]:
    """Go on in a child of this process, the second one of a namespace whose first ends with it.
    Returns what is missing. Call it before there are threads.

    This process stays, waits, removes `directory`, and ends as its child does; or ends it where
    whoever holds the other end of standard input, a pipe, is gone.
    """
    alone, offline = _CLONE_NEWUSER | _CLONE_NEWPID, _CLONE_NEWNET
    kinds = [alone] if network else [alone | offline, alone]
    kind = next((kind for kind in kinds if _in_a_child(kind)), 0)
    missing = [] if network or kind & offline else ["network"]
    if not kind:
        return ["processes", *missing]
    _unshare(kind)
    _limit("RLIMIT_NPROC", _MOST_PROCESSES)  # which outside of a namespace counts all of the user's
    first = os.fork()
    if first:
        _end_with_the_pipe(first)
        _wait_for(first, directory)
    # The first process of the namespace: when it ends, the kernel ends all the others.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    second = os.fork()
    if second:
        _wait_for(second)
    global _alone
    _alone = True
    return missing


def end_others() -> None:
    """End every other process of the namespace but its first: what a program left behind. Does
    nothing where this process has no namespace of its own.
    """
    if _alone:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)


def confine(directory: str, limits: Limits) -> list[str]:
    """Confine this process and its children to come, for good. Returns what is missing."""
    _limit("RLIMIT_AS", limits.memory_bytes)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_FSIZE", _MOST_FILE_BYTES)
    if not sys.platform.startswith("linux"):
        return ["files"]
    missing = [] if _landlock([directory, *limits.writable]) else ["files"]
    if not limits.network and not _without_path_sockets():
        missing.append("sockets")
    return missing


def _limit(name: str, most: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    kind = getattr(resource, name)
    _, hard = resource.getrlimit(kind)
    if hard == resource.RLIM_INFINITY or hard > most:
        resource.setrlimit(kind, (most, most))


def _without_path_sockets() -> bool:
    """Refuse sockets of the family AF_UNIX, but for pairs, and io_uring, which makes them too."""
    known = _SECCOMP.get(platform.machine())
    if known is None or sys.byteorder != "little":
        return False
    architecture, socket_call = known
    refuse = _ERRNO | errno.EACCES
    # (code, jump if true, if false, operand): seccomp_data has the call at 0, the architecture at
    # 4, the first argument at 16.
    program = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, refuse),  # the calls of another architecture
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 5, 0, 0x40000000),  # of x32, likewise
        (_EQUAL, 4, 0, _IO_URING_SETUP),
        (_EQUAL, 0, 2, socket_call),
        (_LOAD, 0, 0, 16),
        (_EQUAL, 1, 0, 1),  # AF_UNIX
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, refuse),
    ]
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    header = _Program(len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(header), 0, 0) == 0


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_void_p))


def _landlock(writable: Sequence[str]) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    rights = sum(bits for since, bits in _WRITE_RIGHTS.items() if since <= version)
    attributes = struct.pack("=QQQ", rights, 0, _SCOPES if version >= 6 else 0)
    # An older kernel knows fewer fields, and refuses more than it knows.
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    if rules < 0:
        return False
    try:
        for path in (*writable, os.devnull):
            allowed = rights if os.path.isdir(path) else rights & _FILE_RIGHTS
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", allowed, place)
            added = libc.syscall(_LANDLOCK_ADD, rules, ctypes.c_int(1), rule, ctypes.c_uint32(0))
            os.close(place)
            if added != 0:
                return False
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        return libc.syscall(_LANDLOCK_RESTRICT, rules, ctypes.c_uint32(0)) == 0
    finally:
        os.close(rules)


def _in_a_child(kind: int) -> bool:
    """Whether it works. Tried in a child, since a namespace without its user is no place to be."""
    if not sys.platform.startswith("linux"):
        return False
    child = os.fork()
    if not child:
        try:
            _unshare(kind)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def _unshare(kind: int) -> None:
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(ctypes.c_int(kind)) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _end_with_the_pipe(child: int) -> None:
    """Stay until that child has ended, or the pipe's other end is closed: nobody is there to end
    one that is busy then. Returns at once where a kernel has no pidfd_open(2).
    """
    with contextlib.suppress(OSError):
        poller = select.poll()
        poller.register(os.pidfd_open(child), select.POLLIN)
        poller.register(0, 0)  # it hangs up, whatever is asked for
        os.closerange(1, 3)
        poller.poll()
        os.kill(child, signal.SIGKILL)


def _wait_for(child: int, directory: str | None = None) -> None:
    """Stay until that child has ended, and end as it did; take in what is left without a parent."""
    os.closerange(0, os.sysconf("SC_OPEN_MAX"))  # pipes end with the child, and not with us
    while True:
        pid, status = os.wait()
        if pid == child:
            if directory is not None:  # whoever made it may be gone
                shutil.rmtree(directory, ignore_errors=True)
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
