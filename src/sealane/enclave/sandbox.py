"""What an enclave gives up before it reads a word, and what it says of it.

The launcher gives up what all enclaves inherit (`drop_privileges`), each enclave the rest (`Sandbox.enter`). Nothing here raises
where a measure cannot be had: the enclave reports each by name, and the agent, before it hands over a key, decides
(`why_not`). The measures and what each forbids:

    user           a user and group of its own, no supplementary groups; not root
    capabilities   none
    privileges     no_new_privs: no set-uid program gives it any
    dumpable       not readable by ptrace(2) or /proc/PID/mem, also by its own user; no core dump
    memory         all of it locked, also what comes later: no key and no page of a guest is ever swapped out
    descriptors    nothing open but its call socket, stderr, /dev/null and its own /proc/self/status
    limits         few descriptors, no core, no message queues, no priority
    files          Landlock: no file can be opened, made, removed
    network        Landlock ABI 4: no TCP port bound or connected
    signals        Landlock ABI 6: no signal to, no abstract socket of, processes outside
    calls          seccomp: only the system calls of `seccomp.TABLE`
"""

import ctypes
import os
import resource
import signal
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from sealane.enclave import landlock
from sealane.enclave.seccomp import SystemCallFilter
from sealane.errors import HostError
from sealane.limits import ENCLAVE_DESCRIPTORS_MAX

_PR_SET_PDEATHSIG: Final = 1
_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_GET_NO_NEW_PRIVS: Final = 39
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION_3: Final = 0x2008_0522
# mlockall(2) on all architectures that Python runs on but alpha, powerpc and sparc
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4

MEASURES: Final = (
    "user", "capabilities", "privileges", "dumpable", "memory", "descriptors", "limits", "files", "network", "signals", "calls"
)  # fmt: skip
# What every Linux since 5.9 gives to every user, in containers too.
REQUIRED: Final = frozenset({"privileges", "dumpable", "descriptors", "limits", "calls"})
# What is missing from older kernels, or for an agent that is not root; `signals` came with Linux 6.12.
STRICT: Final = frozenset(MEASURES) - {"signals"}

Measures = Mapping[str, str]  # why a measure does not hold; empty where it does


def why_not(measures: Measures, policy: str) -> list[str]:
    """What of it the policy (`strict`, `required`, `best-effort`) does not accept; empty means go on."""
    wanted = {"strict": STRICT, "required": REQUIRED, "best-effort": frozenset[str]()}[policy]
    return [
        f"{name}: {measures.get(name, 'not told')}" for name in MEASURES if name in wanted and measures.get(name, "?")
    ]


def drop_privileges(uid: int | None, gid: int | None) -> None:
    """In the launcher: become that user for good (None: stay), gain nothing any more, be read by nobody."""
    with suppress(ValueError, OSError):  # only root may; `memory` will not hold
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if uid is not None and gid is not None:
        try:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        except OSError:
            pass  # a container without that user: `user` will not hold
    _drop_capabilities()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_MSGQUEUE, resource.RLIMIT_NICE, resource.RLIMIT_RTPRIO):
        resource.setrlimit(limit, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the agent's business


def _drop_capabilities() -> None:
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    library.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def die_with_parent(parent: int) -> None:
    """Be killed when `parent` dies; ends the process at once where it is dead already. A fork clears it: call it again."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def outlive_parent() -> None:
    """Undo `die_with_parent`, in the thread that did it; raises OSError."""
    if _prctl(_PR_SET_PDEATHSIG, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def name_process(name: str) -> None:
    """What ps(1) shows of this process, besides its command line."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()))


class Sandbox:
    """Made in the launcher; `enter` it in each enclave, once, with one thread. `uid` is the enclaves' own user, or None."""

    def __init__(self, uid: int | None) -> None:
        self._uid = uid
        self._filter: SystemCallFilter | HostError
        try:
            self._filter = SystemCallFilter()
        except HostError as error:
            self._filter = error

    def enter(self, keep: frozenset[int]) -> dict[str, str]:
        """Give up everything but the descriptors in `keep` and the first three; says what holds, as the kernel tells it."""
        measures = dict.fromkeys(MEASURES, "")
        resource.setrlimit(resource.RLIMIT_NOFILE, (ENCLAVE_DESCRIPTORS_MAX, ENCLAVE_DESCRIPTORS_MAX))
        status = _status()
        measures["user"] = _wrong_user(status, self._uid)
        measures["capabilities"] = "it has some" if int(status["CapEff"], 16) or int(status["CapPrm"], 16) else ""
        measures["privileges"] = "" if _prctl(_PR_GET_NO_NEW_PRIVS, 0) == 1 else "they can be gained"
        measures["dumpable"] = "it is" if _prctl(_PR_GET_DUMPABLE, 0) else ""
        measures["memory"] = _lock_memory()
        measures["descriptors"] = _others_open(keep)
        measures["limits"] = _limits_missing()
        try:
            abi = landlock.restrict()
        except HostError as error:
            measures |= dict.fromkeys(("files", "network", "signals"), error.detail)
        else:
            measures["network"] = "" if abi >= landlock.NET_ABI else f"Landlock ABI {abi} does not know TCP"
            measures["signals"] = "" if abi >= landlock.SCOPE_ABI else f"Landlock ABI {abi} does not know signals"
        try:
            if isinstance(self._filter, HostError):
                raise self._filter
            self._filter.load()
        except HostError as error:
            measures["calls"] = error.detail
        return measures


def _status() -> dict[str, str]:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def _wrong_user(status: Mapping[str, str], uid: int | None) -> str:
    if set(status["Uid"].split()) == {str(uid)} and "0" not in status["Gid"].split() and not status["Groups"]:
        return ""
    return "it is root" if "0" in status["Uid"].split() else "it is the agent's own"


def _lock_memory() -> str:
    """Lock what is mapped as it is touched, and what will be; why not.

    Not within a limit, even one that is not reached yet: the mapping that reaches it would fail in mid-copy. A fork does not
    inherit locks, so this is each enclave's own to do.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        return f"RLIMIT_MEMLOCK is {soft // 1024} KiB"
    library = ctypes.CDLL(None, use_errno=True)
    if library.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        return f"mlockall(2): {os.strerror(ctypes.get_errno())}"
    return ""


def _others_open(keep: frozenset[int]) -> str:
    listing = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    try:
        others = {int(name) for name in os.listdir(listing)} - keep - {0, 1, 2, listing}
        others = {each for each in others if _is_open(each)}
    finally:
        os.close(listing)
    return f"{len(others)} more are open" if others else ""


def _is_open(descriptor: int) -> bool:
    """Whether it still is: what listed the directory had one of its own."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _limits_missing() -> str:
    wanted = {"RLIMIT_CORE": 0, "RLIMIT_MSGQUEUE": 0, "RLIMIT_NOFILE": ENCLAVE_DESCRIPTORS_MAX}
    missing = [name for name, most in wanted.items() if max(resource.getrlimit(getattr(resource, name))) > most]
    return f"{', '.join(missing)} not set" if missing else ""


def _prctl(option: int, value: Any) -> int:
    """0, as no kernel refuses these; should one do, errno says why, and a measure that was to hold is told as missing."""
    return int(ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0))
