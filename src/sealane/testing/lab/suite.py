"""All experiments in one go, and their results as one plain object: what the report, the JSON and docs/results.md are made of."""

import platform
import time
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np

import sealane
from sealane.cli.output import Output
from sealane.errors import SealaneError
from sealane.lab.cracking import coincidence, keystream_reuse, rc4_bias, read_with_crib
from sealane.lab.sight import PAGE_BYTES, Pages
from sealane.testing.accel import choose_accel
from sealane.testing.lab.attacks import ATTACKS, Outcome
from sealane.testing.lab.experiments import staged, tell_attack, tell_leak
from sealane.testing.lab.guest import HARDWARE, USERS
from sealane.testing.lab.leak import measure
from sealane.testing.lab.papers import measure_papers
from sealane.testing.lab.stage import QEMU_WAYS, WAYS, Stage
from sealane.testing.packages import release
from sealane.testing.problems import RigError
from sealane.testing.qemu import find_qemu

COMMANDS: Final = (
    (
        "leak table, carving, broken codecs",
        "sealane lab leak; sealane lab carve --way WAY; sealane lab break --way WAY",
    ),
    ("attacks", "sealane lab tamper|truncate|replay|redirect|flood|downgrade --way WAY"),
    ("the papers' measurements", "./run bench paper-kvm; ./run bench paper-sgx (here with --quick)"),
    ("all of it", "./run lab --json FILE"),
)
_SAMPLE_BYTES: Final = 4 << 20


def run_all(
    out: Output, *, ways: tuple[str, ...] = WAYS, attacked: tuple[str, ...] = WAYS, with_papers: bool = True
) -> dict[str, Any]:
    """Run every experiment and tell of each; `results["verdict"]` has what it comes to.

    With `with_papers` the papers' benches follow in their short form.
    """
    started, begun = time.monotonic(), datetime.now(UTC)
    results: dict[str, Any] = {
        "made_at": begun.isoformat(timespec="seconds"),
        "machine": machine(),
        "commands": COMMANDS,
    }
    with staged() as stage:
        table = measure(stage, ways=ways, say=out.line)
        tell_leak(out, table)
        results["leak"] = table.as_dict() | {"users": sorted(USERS)}
        results["bytes"] = _byte_counts(stage, out)
        results["rc4"] = _rc4(stage, out)
    results["attacks"] = [told.as_dict() for told in _attack_all(out, attacked)]
    results["papers"], results["papers_problem"] = _papers(out) if with_papers else ({}, "left out")
    results["took_s"] = round(time.monotonic() - started)
    results["verdict"] = verdict(results)
    for name, value in results["verdict"].items():
        out.line(f"{name.replace('_', ' ')}: {value}")
    return results


def _papers(out: Output) -> tuple[dict[str, Any], str]:
    """The papers' benches in their short form, or why they could not be made; the attacks are told all the same."""
    out.line("the papers' benches, in their short form")
    try:
        return measure_papers(), ""
    except (RigError, SealaneError) as error:
        out.line(f"✗ the papers' benches: {error}")
        return {}, str(error)


def machine() -> dict[str, str]:
    """What all of it ran on."""
    qemu = find_qemu()
    accel = choose_accel("auto", qemu)
    return {
        "sealane": sealane.__version__,
        "QEMU": ".".join(map(str, qemu.version)),
        "accelerator": f"{accel.name} ({accel.reason})",
        "guest": f"{HARDWARE.memory_mib} MiB, Debian's cloud kernel, VGA console",
        "host kernel": platform.release(),
        "system": " ".join(release()),
        "Python": platform.python_version(),
    }


def _byte_counts(stage: Stage, out: Output) -> dict[str, Any]:
    """How evenly the bytes are spread that the wire shows of pages: noise has an index of coincidence of 1/256."""
    found = {}
    for way in ("plain", "hrt", "sealed"):
        take = stage.move(way)
        if not take.completed:
            raise RigError(f"{way}: {take.problem}")
        shown = (
            take.sight.coded.reshape(-1) if way == "hrt" else np.frombuffer(max(take.sight.flows, key=len), np.uint8)
        )
        middle = len(shown) // 2
        counts = np.bincount(shown[max(0, middle - _SAMPLE_BYTES // 2) : middle + _SAMPLE_BYTES // 2], minlength=256)
        found[way] = {"counts": counts.tolist(), "coincidence": round(coincidence(counts), 5)}
        out.line(f"{way}: index of coincidence {found[way]['coincidence']}")
    return found


def _rc4(stage: Stage, out: Output) -> dict[str, Any]:
    """Is a keystream of `rc4` used again? And would it be seen if it were?"""
    takes = [stage.move("rc4") for _ in range(2)]
    if not all(take.completed for take in takes):
        raise RigError(f"rc4: {takes[0].problem or takes[1].problem}")
    first, second = (take.sight.coded for take in takes)
    control, read = _control(takes[0].sight.clear)
    told = {
        "pages": [len(first), len(second)],
        "deviations": round(keystream_reuse(first, second), 1),
        "control_deviations": round(control, 1),
        "control_pages_read": read,
        "second_byte_zero": round(rc4_bias(), 2),
    }
    out.line(
        f"rc4: two captures agree {told['deviations']} standard deviations more than by chance (5 would show a keystream used "
        f"twice; control: {told['control_deviations']}, {read} pages read); its second byte is zero "
        f"{told['second_byte_zero']} times as often as it should"
    )
    return told


def _control(pages: Pages) -> tuple[float, int]:
    """The same test on pages of the capture under one keystream twice, which shows that it can see what it looks for."""
    half = len(pages) // 2
    stream = np.random.default_rng(1).integers(0, 256, (half, PAGE_BYTES), dtype=np.uint8)
    once, again = pages[:half] ^ stream, pages[half : 2 * half] ^ stream
    read = read_with_crib(once, again, pages[:half])
    return keystream_reuse(once, again), int((read == pages[half : 2 * half]).all(axis=1).sum())


def _attack_all(out: Output, ways: tuple[str, ...]) -> list[Outcome]:
    """Each attack on hosts of its own, so that what one left behind does not change the next."""
    found: list[Outcome] = []
    for name, attack in ATTACKS.items():
        with staged() as stage:
            for way in ways:
                try:
                    found.append(attack(stage, way))
                except (RigError, SealaneError) as error:
                    found.append(
                        Outcome(name, way, False, "the experiment failed", "not known", str(error), "lab.failed")
                    )
                    tell_attack(out, found[-1])
                    break
                tell_attack(out, found[-1])
    return found


def verdict(results: dict[str, Any]) -> dict[str, Any]:
    """What the results come to; each is recomputed from them."""
    leak, attacks = results["leak"], results["attacks"]
    cells = leak["cells"]
    read = {way: sum(row[way] != "-" for row in cells.values()) for way in leak["captured_bytes"]}
    ours = [each for each in attacks if each["way"] not in QEMU_WAYS]
    sealed = [each for each in attacks if each["way"] == "sealed"]
    broken = [each["codec"] for each in leak["breaking"] if each["key"]]
    return {
        "secrets_planted": sum(leak["planted"].values()),
        "secrets_read": read,
        "codecs_broken": broken,
        "attacks_that_won_over_plain": [
            each["attack"] for each in attacks if each["way"] == "plain" and each["attacker_won"]
        ],
        "attacks_that_won_over_sealane": [f"{each['attack']} ({each['way']})" for each in ours if each["attacker_won"]],
        "experiments_that_failed": [
            *(f"{each['attack']} ({each['way']})" for each in attacks if each["code"] == "lab.failed"),
            *(["the papers' benches"] if results["papers_problem"] not in ("", "left out") else []),
        ],
        "premise": leak["premise"],
        "sealed_withstood": read.get("sealed") == 0
        and bool(sealed)
        and not any(each["attacker_won"] or each["code"] == "lab.failed" for each in sealed),
    }
