"""Lets spin look at every state of the models in `models/`: `python -m tests.models.check`, or `./run model`.

spin(1) writes a program in C for the model and its claims, gcc compiles it, and it walks all states that can be reached,
in any order of all that can happen. A claim holds only if the walk was complete and nothing was cut off.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.models.table import DRAWN, HANDSHAKE_TABLE, MODELS, TABLE


@dataclass(frozen=True)
class Model:
    """A model: its file, the table that it includes, and its claims."""

    path: Path
    table: Path
    safety: tuple[str, ...]
    liveness: tuple[str, ...] = ()


MODEL = MODELS / "handover.pml"
SAFETY = ("in_the_table", "never_two", "never_none", "doubt_is_paused")
# A claim about whole runs. It holds for every run, so also for every fair one.
LIVENESS = ("ends",)
HANDOVER = Model(MODEL, TABLE, SAFETY, LIVENESS)
POSTCOPY = Model(
    MODELS / "postcopy.pml",
    TABLE,
    ("in_the_table", "never_two", "never_none", "never_back", "given_up"),
    liveness=("ends",),
)
# What an end that believes may rely on, one by one; `everything` is all of them in one walk.
AGREEMENT = (
    "right_host",
    "same_channel",
    "same_peer",
    "same_role",
    "same_migration",
    "same_subject",
    "fresh",
    "same_nonce",
    "same_seed",
    "this_round",
    "once",
    "both",
    "secret",
    "in_the_table",
)
HANDSHAKE = Model(MODELS / "handshake.pml", HANDSHAKE_TABLE, ("everything", *AGREEMENT))
_DEPTH_MAX = 1_000_000
_TIMEOUT_S = 900


class SpinError(Exception):
    """spin, gcc or the verifier failed, or its answer is not one."""


@dataclass(frozen=True)
class Verdict:
    """What the walk for one claim came to; `violation` is empty where the claim holds in all states."""

    claim: str
    violation: str
    states: int
    transitions: int
    depth: int
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether every state was looked at, and none breaks the claim."""
        return not self.violation


def verify(claims: Sequence[str], defines: Sequence[str] = (), model: Model = HANDOVER) -> list[Verdict]:
    """Check these claims of the model with these defines (`NAME` or `NAME=VALUE`); raises SpinError without an answer.

    An assertion in the model that fails is a violation too, whatever the claim; the define CLAIMS_ONLY leaves them out.
    """
    with tempfile.TemporaryDirectory(prefix="spin-") as scratch:
        directory = Path(scratch)
        _generate(directory, defines, model)
        return [_walk(directory, claim, is_safety=claim in model.safety) for claim in claims]


def _generate(directory: Path, defines: Sequence[str], model: Model) -> None:
    for path in (model.path, model.table):
        shutil.copy(path, directory)
    _run(["spin", "-a", *(f"-D{each}" for each in defines), model.path.name], directory)


def _walk(directory: Path, claim: str, *, is_safety: bool) -> Verdict:
    program = directory / ("safety" if is_safety else "liveness")
    if not program.exists():
        options = ["-DSAFETY"] if is_safety else []
        _run(["gcc", "-O1", "-w", "-DCOLLAPSE", *options, "-o", str(program), "pan.c"], directory)
    arguments = [*([] if is_safety else ["-a"]), f"-m{_DEPTH_MAX}", "-N", claim]
    begun = time.monotonic()
    said = _run([str(program), *arguments], directory)
    return read(claim, said, time.monotonic() - begun)


def read(claim: str, said: str, seconds: float) -> Verdict:
    """What spin `said` of a claim; raises SpinError where that is no whole walk under this claim."""
    errors = re.search(r"errors: (\d+)", said)
    states = re.search(r"^\s*([\d.e+]+) states, stored", said, re.MULTILINE)
    transitions = re.search(r"^\s*([\d.e+]+) transitions", said, re.MULTILINE)  # beyond nine digits as 4.5e+08
    depth = re.search(r"depth reached (\d+)", said)
    if not (errors and states and transitions and depth) or "max search depth too small" in said:
        raise SpinError(said)
    violation = ""
    if int(errors[1]):
        first = re.search(r"^pan:\d+: (.*)$", said, re.MULTILINE)
        violation = first[1] if first else "an error without a word"
    elif "Search not completed" in said or re.search(rf"never claim\s+\+ \({claim}\)", said) is None:
        raise SpinError(said)
    return Verdict(claim, violation, int(float(states[1])), int(float(transitions[1])), int(depth[1]), seconds)


def unreached(defines: Sequence[str] = (), model: Model = HANDOVER) -> list[str]:
    """Statements of the model that no run comes to; what is never reached is not checked either."""
    with tempfile.TemporaryDirectory(prefix="spin-") as scratch:
        directory = Path(scratch)
        _generate(directory, defines, model)
        _run(["gcc", "-O1", "-w", "-DCOLLAPSE", "-DSAFETY", "-DNOCLAIM", "-o", "pan", "pan.c"], directory)
        said = _run(["./pan", "-E", f"-m{_DEPTH_MAX}"], directory)  # a process may rest anywhere
    if "errors: 0" not in said:
        raise SpinError(said)
    return [line.strip() for line in said.splitlines() if f"{model.path.name}:" in line and '"-end-"' not in line]


def _run(argv: Sequence[str], directory: Path) -> str:
    try:
        done = subprocess.run(
            argv, cwd=directory, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SpinError(f"{argv[0]}: {error}") from error
    if done.returncode:
        raise SpinError(f"{' '.join(argv)} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    """Check all claims and print what was looked at; 0 where all hold."""
    parser = argparse.ArgumentParser(prog="./run model", description=__doc__)
    parser.add_argument("--only", choices=("handover", "postcopy", "handshake"), help="one of the models")
    parser.add_argument("--rounds", type=int, default=2, help="hand-over: migrations that are tried [2]")
    parser.add_argument("--crashes", type=int, default=3, help="hand-over, postcopy: crashes, cuts [3]")
    parser.add_argument("--sessions", type=int, default=3, help="handshake: sessions of the two honest hosts [3]")
    parser.add_argument("--define", action="append", default=[], metavar="NAME", help="take a safeguard out")
    arguments = parser.parse_args()
    for path, draw in DRAWN.items():
        if path.read_text() != draw():
            print(f"{path.name} is not what the code says: python -m tests.models.table", file=sys.stderr)
            return 1
    verdicts = []
    if arguments.only in {None, "handshake"}:
        verdicts += _check_handshake(arguments.sessions, arguments.define)
    if arguments.only in {None, "handover"}:
        verdicts += _check_handover(arguments.rounds, arguments.crashes, arguments.define)
    if arguments.only in {None, "postcopy"}:
        verdicts += _check_postcopy(arguments.crashes, arguments.define)
    return 0 if all(verdict.holds for verdict in verdicts) else 1


def _check_handshake(sessions: int, defines: Sequence[str]) -> list[Verdict]:
    verdicts = []
    for ends, rounds, claims in ((2, 2, AGREEMENT), (sessions, 1, ("everything",))):
        print(f"handshake: {ends} sessions, {rounds} round{'s' * (rounds > 1)}", *defines)
        sizes = [f"ENDS={ends}", f"ROUNDS={rounds}"]
        verdicts += [_told(claim, [*sizes, *defines], HANDSHAKE) for claim in claims]
    return verdicts


def _check_handover(rounds: int, most: int, defines: Sequence[str]) -> list[Verdict]:
    verdicts = []
    for claims, crashes in ((SAFETY, most), (LIVENESS, min(most, 2))):
        print(f"hand-over: {rounds} migrations, up to {crashes} crashes", *defines)
        sizes = [f"ROUNDS={rounds}", f"CRASHES={crashes}"]
        verdicts += [_told(claim, [*sizes, *defines], HANDOVER) for claim in claims]
    return verdicts


def _check_postcopy(crashes: int, defines: Sequence[str]) -> list[Verdict]:
    print(f"postcopy: up to {crashes} crashes and cuts", *defines)
    claims = (*POSTCOPY.safety, *POSTCOPY.liveness)
    return [_told(claim, [f"CRASHES={crashes}", *defines], POSTCOPY) for claim in claims]


def _told(claim: str, defines: Sequence[str], model: Model) -> Verdict:
    (verdict,) = verify([claim], defines, model)
    print(
        f"  {claim:16} {verdict.violation or 'holds'}: {verdict.states} states, {verdict.transitions} "
        f"transitions, depth {verdict.depth}, {verdict.seconds:.1f} s",
        flush=True,
    )
    return verdict


if __name__ == "__main__":
    sys.exit(main())
