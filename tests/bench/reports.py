"""Reports of the papers' benches with figures made up for the tests alone."""

import random
from typing import Any

from sealane.bench import paper_kvm_report, paper_sgx_report
from sealane.bench.paper_sgx_calls import CALLS, IMAGE_WAYS

TOTALS = {
    "normal": 900.0,
    "hrt": 1200.0,
    "selective": 1150.0,
    "sealed": 1100.0,
    "rc4": 1500.0,
    "tls": 3000.0,
    "ssh": 2500.0,
}


def kvm_report(totals: dict[str, float] = TOTALS, *, noise: float = 0.01, seed: int = 1) -> dict[str, Any]:
    chance = random.Random(seed)
    samples = [
        {
            "load": load,
            "memory_mib": memory,
            "way": way,
            "round": number,
            "total_ms": total * chance.uniform(1 - noise, 1 + noise),
            "downtime_ms": total / 10 * chance.uniform(1 - noise, 1 + noise),
            "peak_cpu_percent": total / 32 * chance.uniform(1 - noise, 1 + noise),
            "cpu_s": total / 500,
            "bytes_sent": 1,
        }
        for load in ("write", "read")
        for memory in (128, 256, 512)
        for number in range(1, 6)
        for way, total in totals.items()
    ]
    table = [{"load": "write", "memory_mib": 128, "pages": 9560 + number, "bytes": 54594028} for number in range(4)]
    made = {
        "bench": "paper-kvm",
        "command": "./run bench paper-kvm",
        "made_at": "2026-01-01T00:00:00+00:00",
        "took_s": 1,
    }
    made |= {
        "machine": {"QEMU": "10"},
        "rounds": 5,
        "samples": samples,
        "not_arrived": [],
        "broken_off": [],
        "table_1": table,
    }
    return made | {"claims": paper_kvm_report.judge(made)}


def sgx_report(**changed: Any) -> dict[str, Any]:
    images = {
        what: {way: [100.0 + 50 * place] * 5 for place, way in enumerate(IMAGE_WAYS)} for what in ("write", "read")
    }
    calls = {name: {"open": [50.0] * 5, "enclave": [58.0] * 5} for name in CALLS}
    ways = dict(zip(paper_sgx_report.WAYS, (2000.0, 2100.0, 2200.0, 2600.0), strict=True))
    totals = [{way: [value + number for number in range(5)] for way, value in ways.items()} for _ in range(5)]
    made = {
        "bench": "paper-sgx",
        "command": "./run bench paper-sgx",
        "made_at": "2026-01-01T00:00:00+00:00",
        "took_s": 1,
    }
    made |= {
        "machine": {"QEMU": "10"},
        "broken_off": [],
        "runs": 5,
        "calls": 5,
        "images_us": images,
        "calls_us": calls,
        "totals_ms": totals,
    }
    made |= changed
    return made | {"claims": paper_sgx_report.judge(made)}
