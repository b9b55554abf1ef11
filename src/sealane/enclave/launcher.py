"""The launcher: a process that has all that an enclave needs loaded, and becomes one by each fork.

    agent --control socket--> launcher    one packet a request, with the enclave's end of a call socket
    agent <--control socket-- launcher    STARTED and the process's number, with its pidfd; or FAILED and why
    agent <------------------ enclave     a child of the agent (see `forking`), which talks to it over the call socket alone

It starts from an empty environment, holds no key (`rehearsal` uses some that open nothing), has one thread and one socket,
and ends when the agent closes that or dies. Starting an interpreter and its libraries costs 0.08 s of CPU at each end of
each migration; a fork costs some ms.

What enclaves of one launcher share, as all forks do: the layout of their address space and the seed of Python's hashes.
Random numbers they do not share: OpenSSL's generators notice a fork by the process id and seed themselves anew
(RAND(7)), Python's does so in PyOS_AfterFork_Child; a test shows both.
"""

import gc
import os
import socket
import sys
import traceback
from typing import Final, NoReturn

from sealane.enclave.forking import fork_for_parent
from sealane.enclave.process import main
from sealane.enclave.rehearsal import rehearse
from sealane.enclave.sandbox import Sandbox, die_with_parent, drop_privileges, name_process
from sealane.errors import SealaneError

LAUNCHER_NAME: Final = "sealane-launch"
ENCLAVE_NAME: Final = "sealane-enclave"  # 15 characters, as many as the kernel keeps
REQUEST: Final = b"start"
STARTED: Final = b"started "
FAILED: Final = b"failed "
PACKET_MAX: Final = 512


def serve(control: socket.socket, sandbox: Sandbox) -> None:
    """Fork an enclave for each request until the agent closes its end. Does not return in the enclaves."""
    agent = os.getppid()
    gc.collect()
    gc.freeze()  # no collection touches, and so copies, what all share
    while True:
        try:
            packet, descriptors, _, _ = socket.recv_fds(control, PACKET_MAX, 1)
        except OSError:
            return
        if not packet:
            return
        if packet == REQUEST and len(descriptors) == 1:
            _start(control, descriptors[0], agent, sandbox)
        for descriptor in descriptors:
            os.close(descriptor)


def _start(control: socket.socket, calls: int, agent: int, sandbox: Sandbox) -> None:
    try:
        pid, pidfd = fork_for_parent()
    except (SealaneError, OSError) as error:
        control.send(FAILED + str(getattr(error, "detail", error)).encode()[: PACKET_MAX - len(FAILED)])
        return
    if pid == 0:
        _become_enclave(calls, agent, sandbox)
    try:
        socket.send_fds(control, [STARTED + str(pid).encode()], [pidfd])
    except OSError:
        pass  # the agent is gone, and the enclave ends with it
    finally:
        os.close(pidfd)


def _become_enclave(calls: int, agent: int, sandbox: Sandbox) -> NoReturn:
    """Never back into the launcher's frames, whatever happens: the process ends here."""
    status = 1
    try:
        die_with_parent(agent)
        name_process(ENCLAVE_NAME)
        os.closerange(3, calls)
        os.closerange(calls + 1, os.sysconf("SC_OPEN_MAX"))
        main(calls, sandbox)
        status = 0
    except BaseException as error:
        sys.stderr.write(_words_of(error))
    finally:
        sys.stderr.flush()
        os._exit(status)


def _words_of(error: BaseException) -> str:
    """As `traceback` prints it, but for the source's lines: the sandbox would end a process that opens a file for them."""
    frames = (
        f'  File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_name}\n'
        for frame, line in traceback.walk_tb(error.__traceback__)
    )
    return f"Traceback (most recent call last):\n{''.join(frames)}{type(error).__name__}: {error}\n"


def launch(descriptor: int, uid: int | None, gid: int | None) -> None:
    """Serve the agent on the inherited control socket, as that user (None: the agent's)."""
    agent = os.getppid()
    rehearse()
    sandbox = Sandbox(uid)
    drop_privileges(uid, gid)
    die_with_parent(agent)
    name_process(LAUNCHER_NAME)
    gc.disable()  # one migration long: what its few cycles hold is less than looking for them in mid-stream costs
    os.set_inheritable(descriptor, False)
    serve(socket.socket(fileno=descriptor), sandbox)
