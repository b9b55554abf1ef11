"""A VM's keeper: one small process for as long as QEMU uses the VM's TPM.

    QEMU --control socket--> keeper --the only control channel--> swtpm
         --------------------------data (passed through)-------->
    agent --admin socket-->  keeper <--link (while it migrates)--> enclave

It passes QEMU's commands on, but for the two that carry state: those go through the enclave of the VM's migration, and where
there is none, state is neither given out nor taken. It watches the files that swtpm writes, and keeps their digest in the
VM's record. It outlives the agent, as QEMU does, and ends with QEMU.
"""

import contextlib
import ctypes
import json
import os
import select
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from sealane.errors import SealaneError, make_error
from sealane.limits import VTPM_ANSWER_TIMEOUT_S
from sealane.vtpm.control import (
    TPM_FAIL,
    BlobType,
    Command,
    Request,
    RequestReader,
    encode_blob,
    encode_no_blob,
    encode_result,
)
from sealane.vtpm.link import Frame, Link, What
from sealane.vtpm.order import Order
from sealane.vtpm.record import Record, digest_of
from sealane.vtpm.vault import Launched, Vault, describe_error

PACKET_MAX: Final = 64 * 1024
_IN_MOVED_TO: Final = 0x80
_IN_CLOSE_WRITE: Final = 0x08
_CONTROL_READ_BYTES: Final = 64 * 1024
# Digests that are remembered, at some 150 bytes each: a TPM that wrote every second would do so for three days.
_SEEN_MAX: Final = 1 << 18
_TRIES: Final = 5
_NEEDED: Final = frozenset({BlobType.PERMANENT, BlobType.VOLATILE})


class Keeper:
    """Serves one VM; `run` returns when QEMU has gone or the agent wants it."""

    def __init__(self, vault: Vault, launched: Launched, qemu: socket.socket, admin: socket.socket) -> None:
        self._vault, self._launched = vault, launched
        self._listener, self._admin = qemu, admin
        self._qemu: socket.socket | None = None
        self._data: int | None = None  # swtpm's end of the TPM's own connection, for a new swtpm
        self._reader = RequestReader()
        self._link: Link | None = None
        self._brought: set[BlobType] = set()
        self._is_started = False  # of what comes: whether swtpm has taken it
        self._settings: dict[Command, bytes] = {}  # what a new swtpm has to be told again
        self._watch = _watch_directory(launched.record.path)
        self._seen = {launched.record.digest, *launched.record.past}
        self._noted_as = (0, 0, 0)  # the file that was noted last: inode, when, bytes
        self._version_at_first = launched.record.version
        # What is incoming comes while its VM stands still: its key is kept meanwhile, its files are noted when `loaded` is asked.
        self._is_noting = launched.record.status != "incoming"
        self._keeping: Future[Record] | None = None if self._is_noting else _in_a_thread(lambda: vault.keep(launched))
        self._over = False
        self._handlers: dict[str, Callable[[dict[str, Any], list[int]], dict[str, Any]]] = {
            "status": self._status,
            "verify": self._verify,
            "link": self._attach,
            "unlink": self._detach,
            "loaded": self._loaded,
            "taken": self._taken,
            "stay": self._stay,
            "rotate": self._rotate,
            "stop": self._stop,
        }

    # ---- life

    def run(self) -> None:
        """Serve until the end; the record is true afterwards."""
        clients: list[socket.socket] = []
        try:
            while not self._over:
                self._turn(clients)
        finally:
            for each in (*clients, self._listener, self._admin, self._qemu, self._link):
                if each is not None:
                    each.close()
            self._launched.swtpm.stop()
            os.close(self._watch)
            if self._data is not None:
                os.close(self._data)
            self._note_end()

    def _turn(self, clients: list[socket.socket]) -> None:
        pidfd = os.pidfd_open(self._launched.swtpm.process.pid)
        try:
            waiting: list[Any] = [self._admin, *clients, self._watch, pidfd, self._qemu or self._listener]
            if self._link is not None:
                waiting.append(self._link)
            ready, _, _ = select.select(waiting, [], [])
        finally:
            os.close(pidfd)
        if self._watch in ready:
            os.read(self._watch, 64 * 1024)
            self._note_written()
        if self._link is not None and self._link in ready:
            self._unlink()  # the enclave speaks only when it is asked: this is its end
        if self._qemu in ready:
            self._hear_qemu()
        elif self._listener in ready:
            self._qemu, _ = self._listener.accept()
        if self._admin in ready:
            clients.append(self._admin.accept()[0])
        for client in [each for each in clients if each in ready]:
            self._hear_agent(client, clients)
        if pidfd in ready:
            self._over = True

    def _note_written(self) -> None:
        """Keep the digest of what swtpm has written; the file is on the disk before the record says so.

        swtpm writes nothing twice: each time it encrypts under a new IV. What was here before and is here again, somebody
        else has put back, and it is not noted; what is not swtpm's, swtpm will not take at the next launch.
        """
        launched = self._launched
        try:
            found = os.stat(launched.swtpm.state_path)
        except FileNotFoundError:
            return
        seen_as = (found.st_ino, found.st_mtime_ns, found.st_size)
        # swtpm writes its volatile state beside it whenever it is asked for it, which QEMU does while the VM stands still
        if not self._is_noting or seen_as == self._noted_as:
            return
        digest = self._vault.digest_now(launched.record)
        self._noted_as = seen_as
        if digest == launched.record.digest:
            return
        if digest in self._seen:
            _say(f"somebody has put back an older copy of the files of {launched.record.vm}'s TPM")
            return
        if len(self._seen) < _SEEN_MAX:
            self._seen.add(digest)
        self._save(launched.record.written(digest))

    def _note_end(self) -> None:
        """The last files, and that nothing comes after them; of what did not come whole there is nothing to note."""
        if self._is_noting:
            self._note_written()
            self._save(replace(self._launched.record, running=False))
        elif self._keeping is not None:
            wait([self._keeping])  # who destroys it finds what was kept

    def _save(self, record: Record) -> None:
        self._launched.record = record.authenticated(self._launched.key)
        self._vault.records.save(self._launched.record)

    # ---- QEMU

    def _hear_qemu(self) -> None:
        assert self._qemu is not None  # noqa: S101 - it was ready
        try:
            data, descriptors, _, _ = socket.recv_fds(self._qemu, _CONTROL_READ_BYTES, 4)
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._over = True
            return
        try:
            for request in self._reader.receive(data):
                answer = self._serve(request, descriptors)
                self._qemu.sendall(answer)
        except (SealaneError, OSError) as error:
            _say(f"QEMU's request failed: {describe_error(error)[1]}")
            self._over = True
        finally:
            for each in descriptors:
                os.close(each)

    def _serve(self, request: Request, descriptors: list[int]) -> bytes:
        control = self._launched.swtpm.control
        match request.command:
            case Command.GET_STATEBLOB:
                return self._give_out(request.blob_type)
            case Command.SET_STATEBLOB:
                return self._take_in(request.blob_type, request.blob)
            case Command.INIT if self._launched.record.status == "incoming":
                return self._start_what_came(request)
            case Command.SET_DATAFD if descriptors:
                self._keep_data(descriptors[0])
            case Command.SET_LOCALITY | Command.SET_BUFFERSIZE:
                self._settings[request.command] = request.data
        return control.exchange(request.command, request.data, descriptors)

    def _start_what_came(self, request: Request) -> bytes:
        if not self._brought >= _NEEDED:
            _say("QEMU would start the TPM without the state that should have come")
            return encode_result(TPM_FAIL)
        answer = self._launched.swtpm.control.exchange(request.command, request.data)
        self._is_started = answer == encode_result(0)
        return answer

    def _keep_data(self, descriptor: int) -> None:
        if self._data is not None:
            os.close(self._data)
        self._data = os.dup(descriptor)

    def _give_out(self, blob_type: BlobType) -> bytes:
        """tpm_state_read and volatile_state_enc, as the enclave asks; nothing where there is no enclave."""
        sealed = self._through_enclave(Frame(What.WANTED, blob_type))
        return encode_no_blob() if sealed is None else encode_blob(sealed)

    def _take_in(self, blob_type: BlobType, sealed: bytes) -> bytes:
        """volatile_state_dec and tpm_state_write."""
        if self._launched.record.status != "incoming":
            _say("a state was brought to a TPM that has one")
            return encode_result(TPM_FAIL)
        if self._through_enclave(Frame(What.OFFERED, blob_type, sealed)) is None:
            return encode_result(TPM_FAIL)
        self._brought.add(blob_type)
        return encode_result(0)

    def _through_enclave(self, question: Frame) -> bytes | None:
        if self._link is None:
            _say(
                f"the {question.blob_type.name.lower()} state was asked for, and no migration of Sealane's is under way"
            )
            return None
        control = self._launched.swtpm.control
        try:
            self._link.send(question)
            while True:
                frame = self._link.receive()
                if frame.blob_type is not question.blob_type:
                    break
                match frame.what, question.what:
                    case What.READ, What.WANTED:
                        state = control.tpm_state_read(frame.blob_type)
                        self._link.send(Frame(What.ANSWER, frame.blob_type, state))
                    case What.WRITE, What.OFFERED:
                        if frame.data:
                            control.tpm_state_write(frame.blob_type, frame.data)
                        self._link.send(Frame(What.ANSWER, frame.blob_type))
                    case What.DONE, _:
                        return frame.data
                    case _:
                        break
        except (OSError, SealaneError) as error:
            _say(f"the enclave's part failed: {describe_error(error)[1]}")
        self._unlink()
        return None

    def _unlink(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    # ---- the agent

    def _hear_agent(self, client: socket.socket, clients: list[socket.socket]) -> None:
        try:
            packet, descriptors, _, _ = socket.recv_fds(client, PACKET_MAX, 4)
        except OSError:
            packet, descriptors = b"", []
        if not packet:
            clients.remove(client)
            client.close()
            return
        try:
            said = json.loads(packet)
            answer = {"ok": self._handlers[said["call"]](said, descriptors)}
        except Exception as error:
            code, detail = describe_error(error)
            answer = {"error": {"code": code, "detail": detail}}
        finally:
            for each in descriptors:
                os.close(each)
        with contextlib.suppress(OSError):
            client.send(json.dumps(answer).encode())

    def _status(self, _said: dict[str, Any], _descriptors: list[int]) -> dict[str, Any]:
        self._note_written()
        return {
            "pid": os.getpid(),
            "swtpm_pid": self._launched.swtpm.process.pid,
            "in_use": self._qemu is not None,
            "linked": self._link is not None,
        }

    def _verify(self, _said: dict[str, Any], _descriptors: list[int]) -> dict[str, Any]:
        """Files, record and counter against what this process knows."""
        launched = self._launched
        if self._vault.records.find(launched.record.vm) != launched.record:
            raise make_error("vtpm.altered", f"the record of {launched.record.vm}'s TPM was changed")
        counter = self._vault.root_of(launched.record.key).counter(launched.record.key)
        if counter is not None and counter != launched.record.key.counter:
            raise make_error("vtpm.old-record", f"the host's TPM has counted to {counter}")
        for _ in range(_TRIES):  # swtpm may write meanwhile
            self._note_written()
            content = self._vault.content(launched.record)
            if digest_of(content) == launched.record.digest:
                return {}
        self._vault.judge(launched.record, content)
        return {}

    def _attach(self, said: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        if self._link is not None:
            raise make_error("vtpm.two-migrations", f"the TPM of {self._launched.record.vm} travels already")
        if len(descriptors) != 1:
            raise make_error("internal.error", "no descriptor for the link")
        if self._keeping is not None and self._keeping.done():
            self._keeping.result()
        self.attach(socket.socket(fileno=os.dup(descriptors[0])))
        return {}

    def attach(self, connection: socket.socket) -> None:
        """Ask the enclave at the other end of this link about states, until it is closed."""
        self._link = Link(connection, VTPM_ANSWER_TIMEOUT_S)

    def _detach(self, _said: dict[str, Any], _descriptors: list[int]) -> dict[str, Any]:
        self._unlink()
        return {}

    def _loaded(self, _said: dict[str, Any], _descriptors: list[int]) -> dict[str, Any]:
        """QEMU has loaded everything: the TPM must be whole, and on the disk with its key, before the source gives up its own."""
        self._come_whole()
        return {}

    def _come_whole(self) -> None:
        """Raises `vtpm.not-brought`, and what keeping the key did."""
        launched = self._launched
        if launched.record.status == "incoming" and not (self._brought >= _NEEDED and self._is_started):
            raise make_error("vtpm.not-brought", f"{launched.record.vm} came, and its TPM did not")
        if launched.swtpm.process.poll() is not None:
            raise make_error("vtpm.swtpm", "swtpm has ended")
        if self._keeping is not None:
            launched.record = self._keeping.result()
            self._keeping = None
        self._is_noting = True
        self._note_written()

    def _taken(self, said: dict[str, Any], _descriptors: list[int]) -> dict[str, Any]:
        """The ticket came: the TPM is this host's."""
        self._come_whole()
        record = self._launched.record
        written_here = record.version - self._version_at_first
        version = max(record.version, int(said["version"]) + written_here)
        self._save(replace(record, status="here", epoch=int(said["epoch"]), version=version))
        return {}

    def _stay(self, said: dict[str, Any], _descriptors: list[int]) -> dict[str, Any]:
        """The VM stays here, under this epoch."""
        self._unlink()
        if self._launched.record.epoch != said["epoch"]:
            self._save(replace(self._launched.record, epoch=int(said["epoch"])))
        return {}

    def _rotate(self, _said: dict[str, Any], _descriptors: list[int]) -> dict[str, Any]:
        """Put the TPM into a new swtpm under the next key. The VM must be paused: a command now would be lost."""
        before = self._launched
        if self._link is not None or before.record.status != "here":
            raise make_error("vtpm.busy", f"the TPM of {before.record.vm} is travelling")
        started = time.monotonic()
        states = {each: before.swtpm.control.tpm_state_read(each) for each in BlobType}
        after = self._vault.relaunch(before, states)
        try:
            if self._data is not None:
                after.swtpm.control.command(Command.SET_DATAFD, descriptors=[self._data])
            for command, data in self._settings.items():
                after.swtpm.control.exchange(command, data)
            after.swtpm.control.start(delete_volatile=True)
            self._vault.commit(after, before.record)
        except BaseException:
            after.swtpm.stop()
            raise
        self._launched = after
        self._seen.add(after.record.digest)
        watch, self._watch = self._watch, _watch_directory(after.record.path)
        os.close(watch)
        before.swtpm.stop()
        return {"took_ms": (time.monotonic() - started) * 1e3}

    def _stop(self, _said: dict[str, Any], _descriptors: list[int]) -> dict[str, Any]:
        self._over = True
        return {}


def _watch_directory(path: Path) -> int:
    """inotify(7): becomes readable when a file of the directory was written or renamed into place."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.inotify_init1(os.O_CLOEXEC)
    if descriptor < 0 or libc.inotify_add_watch(descriptor, os.fsencode(path), _IN_MOVED_TO | _IN_CLOSE_WRITE) < 0:
        raise make_error("vtpm.keeper", f"{path} cannot be watched: {os.strerror(ctypes.get_errno())}")
    return descriptor


def _say(words: str) -> None:
    os.write(2, f"sealane: vTPM: {words}\n".encode())


def listen_at(path: Path, kind: socket.SocketKind) -> socket.socket:
    """A private listening socket, in place of whatever was there; raises OSError."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    listener = socket.socket(socket.AF_UNIX, kind)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(4)
    return listener


def serve_vm(order: Order, answer: socket.socket, listener: socket.socket | None) -> None:
    """A keeper's life. `answer` is told in one line of JSON when it serves, or why it cannot; `listener` listens already."""
    vault = order.vault()
    try:
        with vault.records.locked(order.vm):
            keeper = _start(order, vault, listener)
            _answer(answer, {"ok": {"pid": os.getpid()}})
            try:
                keeper.run()
            finally:
                for path in (order.control_path, order.admin_path):
                    Path(path).unlink(missing_ok=True)
    except SealaneError as error:
        _answer(answer, {"error": {"code": error.code, "detail": error.detail}})


def _start(order: Order, vault: Vault, listener: socket.socket | None) -> Keeper:
    match order.how:
        case "create" | "adopt":
            launched = vault.create(order.epoch, adopt=order.how == "adopt")
        case "open" | "reopen":
            launched = vault.open(order.epoch, after_crash=order.how == "reopen")
        case _:
            launched = vault.receive(order.epoch, order.migration, version=order.version, ek_sha256=order.ek_sha256)
    try:
        admin = listen_at(Path(order.admin_path), socket.SOCK_SEQPACKET)
        return Keeper(vault, launched, listener or listen_at(Path(order.control_path), socket.SOCK_STREAM), admin)
    except OSError as error:
        launched.swtpm.stop()
        raise make_error("vtpm.keeper", f"{order.control_path}: {error.strerror}") from error


def _answer(answer: socket.socket, words: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        answer.sendall(json.dumps(words).encode() + b"\n")
    answer.close()


def _in_a_thread(work: Callable[[], Record]) -> Future[Record]:
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(work)
    finally:
        pool.shutdown(wait=False)


def call_keeper(path: Path, call: str, *, descriptors: list[int] | None = None, **said: Any) -> dict[str, Any]:
    """One call to a VM's keeper. Raises what it answers, and `vtpm.not-running` where there is none."""
    packet = json.dumps({"call": call, **said}).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(VTPM_ANSWER_TIMEOUT_S)
        try:
            connection.connect(str(path))
            socket.send_fds(connection, [packet], descriptors or [])
            data = connection.recv(PACKET_MAX)
        except (FileNotFoundError, ConnectionRefusedError):
            raise make_error("vtpm.not-running") from None
        except OSError as error:
            raise make_error("vtpm.keeper", f"no answer to {call}: {error}") from error
    if not data:
        raise make_error("vtpm.not-running")
    answer: dict[str, Any] = json.loads(data)
    if "error" in answer:
        raise make_error(str(answer["error"]["code"]), str(answer["error"]["detail"]))
    found: dict[str, Any] = answer["ok"]
    return found
