"""Active attacks on a migration, against QEMU's own ways and against Sealane: what each got, and where the guest runs after it."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

from sealane.lab import impostor
from sealane.lab.pcap import Conversation
from sealane.lab.tampers import OldVersions, Replace
from sealane.testing.console import ConsoleLog
from sealane.testing.hosts import SimulatedHost
from sealane.testing.lab.guest import SENTENCE
from sealane.testing.lab.stage import QEMU_WAYS, Stage, Take, plain_port, send_by_qemu, wake, way_name
from sealane.testing.machine import GuestMachine
from sealane.testing.problems import RigError
from sealane.testing.wiretap import Tamper, cut_after, enter_network, flip_bit

FALSE_SENTENCE: Final = b"pay 999 to mallo"
_INTO_THE_PAGES: Final = 8 << 20
_LANE: Final = 1  # the relay's number of the first lane's connection; the channel's is 0
_WAIT_S: Final = 20.0
Made = TypeVar("Made")


@dataclass
class Outcome:
    """What came of one attack. `attacker_won` is what he wanted; `vm` says where the guest runs now; `said` the error, if any."""

    attack: str
    way: str
    attacker_won: bool
    got: str
    vm: str
    said: str = ""
    code: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def outcome(attack: str, take: Take, stage: Stage, *, won: bool, got: str) -> Outcome:
    """How an attempt to move the guest ended: the guest must be alive where it is said to be."""
    stage.wait_ticks()
    vm = "runs at the destination" if take.completed else "runs at the source"
    return Outcome(attack, take.way, won, got, vm, take.problem, take.code)


def on_network(host: SimulatedHost, act: Callable[[], Made]) -> Made:
    """Acts on a simulated host's network, in a thread of its own."""
    done: list[Made] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            if host.namespace is not None:
                enter_network(host.namespace)
            done.append(act())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="attacker")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


# ---- changing what passes


def tamper(stage: Stage, way: str) -> Outcome:
    """Change a sentence in the running guest while it moves; under encryption, where none is seen, one bit of the pages."""
    before = SENTENCE if SENTENCE.decode() in _last_said(stage) else FALSE_SENTENCE
    after = FALSE_SENTENCE if before == SENTENCE else SENTENCE
    replace = Replace(before, after)
    tampers: tuple[Tamper, ...] = (replace,)
    if way == "tls":
        tampers += (flip_bit("forward", offset=_INTO_THE_PAGES),)
    elif way != "plain":
        tampers += (flip_bit("forward", offset=_INTO_THE_PAGES, connection=_LANE),)
    take = stage.move(way, tampers=tampers)
    told = outcome("tamper", take, stage, won=False, got="")
    says = _last_said(stage)
    told.attacker_won = after.decode() in says
    if told.attacker_won:
        told.got = f"the running guest says {says!r} in place of {before.decode()!r}"
    else:
        seen = "the sentence passed and was changed" if replace.hits else "the sentence was not to be seen"
        told.got = f"{seen}; the guest says {says!r} as before"
    return told


def _last_said(stage: Stage) -> str:
    lines = [line for line in stage.guest.console.lines if line.startswith("says ")]
    return lines[-1][5:] if lines else SENTENCE.decode()


def truncate(stage: Stage, way: str) -> Outcome:
    """Cut the connection in the middle of the pages."""
    where = cut_after("forward", offset=_INTO_THE_PAGES, connection=None if way in QEMU_WAYS else _LANE)
    take = stage.move(way, tampers=(where,))
    return outcome(
        "truncate", take, stage, won=take.completed, got="the migration ends; nothing runs on half of the memory"
    )


# ---- repeating what passed


def replay(stage: Stage, way: str) -> Outcome:
    """Move the guest, and then say again to the destination all that was heard, while the guest runs elsewhere."""
    take = stage.move(way)
    if not take.completed:
        raise RigError(f"{way_name(way)}: the guest did not arrive: {take.problem}")
    # the guest goes back by a way that leaves the first destination free, as after any move home
    back = stage.move(way)
    if not back.completed:
        raise RigError(f"{way_name(way)}: the guest did not return: {back.problem}")
    victim = stage.guest.machines[stage.away.name]
    if way in QEMU_WAYS:
        return _replay_to_qemu(stage, victim, take.conversations, way)
    host = stage.away.host
    ended = on_network(stage.home.host, lambda: impostor.play((host.address, host.port), take.conversations))
    runs = victim.is_running or bool(_qemus_of(stage))
    stage.wait_ticks()
    got = ", ".join(f"connection {number}: {how}, {size} bytes came back" for number, (how, size) in enumerate(ended))
    return Outcome("replay", way, runs, got, "runs at the source" if not runs else "runs twice", _journal_word(stage))


def _qemus_of(stage: Stage) -> list[int]:
    """QEMU processes at the destination."""
    pids = stage.away.processes()
    found = []
    for pid in pids:
        with suppress(OSError), open(f"/proc/{pid}/comm") as name:
            if name.read().startswith("qemu-system"):
                found.append(pid)
    return found


def _journal_word(stage: Stage) -> str:
    """What the destination's agent says of its last migration."""
    with stage.away.client() as client:
        last = max(client.migrations(), key=lambda each: each.started_at, default=None)
    if last is None or last.state == "completed":
        return "the destination's agent knows of no further migration"
    return f"the destination's agent: {last.state}, {last.problem.code if last.problem else ''}"


def _replay_to_qemu(stage: Stage, victim: GuestMachine, heard: list[Conversation], way: str) -> Outcome:
    host = stage.away.host
    victim.start_incoming()
    try:
        with victim.observe() as monitor:
            if way == "tls":
                monitor.execute(
                    "object-add", qom_type="tls-creds-psk", id="again", dir=str(host.scratch / "psk"), endpoint="server"
                )
                monitor.execute("migrate-set-parameters", tls_creds="again", tls_hostname="")
            monitor.execute("migrate-incoming", uri=f"tcp:{host.address}:{plain_port(host)}")
        on_network(stage.home.host, lambda: impostor.play((host.address, plain_port(host)), heard))
        ticks = _ticks_within(victim, 5.0)
        log = (victim.directory / "qemu.log").read_text(errors="replace").strip().splitlines()
    finally:
        victim.stop()
    stage.wait_ticks()
    if ticks:
        got = "an old state of the guest runs beside the guest: two of it, with one memory and one identity"
        return Outcome("replay", way, True, got, "runs at the source, and an old copy at the destination")
    return Outcome("replay", way, False, "no guest runs from it", "runs at the source", log[-1] if log else "")


def _ticks_within(machine: GuestMachine, seconds: float) -> int:
    """How often the guest counted on this machine, waiting for one at the most so long."""
    deadline = time.monotonic() + seconds
    console = ConsoleLog(machine.console_path)
    while not console.ticks and machine.is_running and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(console.ticks)


# ---- false hosts


def redirect(stage: Stage, way: str) -> Outcome:
    """Lead the source to a host of the attacker's, as a false answer to ARP or DNS does."""
    if way in QEMU_WAYS:
        return _redirect_qemu(stage, way)
    host = stage.away.host
    listener = on_network(host, lambda: socket.create_server((host.address, 0)))
    address, port = listener.getsockname()
    with impostor.FalseDestination(host.scratch / "false", listener) as false:
        stage.home.trust(stage.away, address=address, port=port)
        try:
            take = stage.move_overheard_by_nobody(way)
        finally:
            stage.home.trust(stage.away)
    told = outcome("redirect", take, stage, won=bool(false.received) and not false.was_refused, got="")
    behind = "a refusal" if false.was_refused else f"{len(false.received)} bytes"
    told.got = f"a TLS handshake and {behind} behind it ({false.ended})"
    return told


def _redirect_qemu(stage: Stage, way: str) -> Outcome:
    """The attacker's own QEMU takes the guest; it is thrown away, and the source's is woken again."""
    host, there = stage.away.host, stage.machine
    model = stage.guest.machines[stage.away.name]
    thief = GuestMachine(
        host.scratch / "thief",
        model.qemu,
        model.accel,
        model.hardware,
        model.workload,
        name=model.name,
        launcher=model.launcher,
        environment=model.environment,
    )
    with thief:
        thief.start_incoming()
        problem = send_by_qemu(there, thief, (host.address, plain_port(host)), host, tls=way == "tls", other_key=True)
        ticks = _ticks_within(thief, 5.0) if not problem else 0
    if not problem:
        wake(there)
    stage.wait_ticks()
    if ticks:
        return Outcome(
            "redirect",
            way,
            True,
            "the whole guest: it runs at the attacker's",
            "ran at the attacker's; woken again at the source",
        )
    return Outcome("redirect", way, False, "nothing", "runs at the source", problem)


def flood(stage: Stage, way: str) -> Outcome:
    """Many false sources at the destination's port, before and while the true one comes."""
    host = stage.away.host
    if way in QEMU_WAYS:
        return _flood_qemu(stage, way)
    held = on_network(stage.home.host, lambda: impostor.Flood((host.address, host.port)).__enter__())
    try:
        take = stage.move(way)
    finally:
        held.__exit__(None, None, None)
    got = f"{held.opened} connections were opened; the migration was {'made' if take.completed else 'kept from happening'}"
    return outcome("flood", take, stage, won=not take.completed, got=got)


def _flood_qemu(stage: Stage, way: str) -> Outcome:
    """One connection with nonsense is enough for a QEMU that waits."""
    host, here = stage.away.host, stage.guest.machines[stage.away.name]
    nonsense = [Conversation(("attacker", 0), (host.address, plain_port(host)))]
    nonsense[0].forward.data = b"no migration stream" * 100
    here.start_incoming()

    def before_the_source() -> None:
        on_network(stage.home.host, lambda: impostor.play((host.address, plain_port(host)), nonsense))

    problem = send_by_qemu(
        stage.machine, here, (host.address, plain_port(host)), host, tls=way == "tls", meanwhile=before_the_source
    )
    if not problem:
        wake(stage.machine)
    here.stop()
    stage.wait_ticks()
    got = (
        "one connection with nonsense, and the QEMU that waited is gone"
        if problem
        else "nothing: the true source came in"
    )
    return Outcome("flood", way, bool(problem), got, "runs at the source", problem)


def downgrade(stage: Stage, way: str) -> Outcome:
    """Have the ends speak something weaker: TLS 1.3 taken out of the hello, an old TLS offered."""
    if way == "plain":
        return Outcome(
            "downgrade", way, True, "nothing is to be taken away: there is no protection", "runs at the source"
        )
    old = OldVersions()
    take = stage.move(way, tampers=(old,))
    told = outcome("downgrade", take, stage, won=take.completed and old.hits > 0, got="")
    told.got = f"TLS 1.3 was taken out of {old.hits} hello"
    if way not in QEMU_WAYS:
        host = stage.away.host
        offered = on_network(stage.home.host, lambda: impostor.offer_old_tls((host.address, host.port)))
        told.got += f"; TLS 1.2 offered by the attacker himself was {offered}"
        told.attacker_won |= offered.startswith("accepted")
    return told


ATTACKS: Final[dict[str, Callable[[Stage, str], Outcome]]] = {
    "truncate": truncate,
    "downgrade": downgrade,
    "redirect": redirect,
    "flood": flood,
    "replay": replay,
    "tamper": tamper,
}
