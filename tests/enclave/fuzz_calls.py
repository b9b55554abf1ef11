"""Coverage-guided fuzzing of the calls: `python -m tests.enclave.fuzz_calls [libFuzzer's options] [DIRECTORY]`.

An input is a row of packets, each behind a byte that says how many sockets come with it; 0xFF 0xFF parts them. Every packet
is a call or an InternalError, and an enclave that is served them in this order refuses or serves, and leaves nothing open.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import atheris

with atheris.instrument_imports(include=["sealane.enclave"]):
    from sealane.enclave.interface import Ecall, encode_call, parse_call
    from sealane.errors import InternalError
    from tests.enclave import test_interface

_PARTING = b"\xff\xff"
_ECALLS = get_args(Ecall)


def run_one(data: bytes) -> None:
    served: list[tuple[Any, int]] = []
    for packet in data.split(_PARTING):
        try:
            call = parse_call(packet[1:])
        except InternalError:
            continue
        assert parse_call(encode_call(call)) == call
        if isinstance(call, _ECALLS):
            served.append((call, packet[0] % 4))
    test_interface.serve_all(served)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for number, call in enumerate(test_interface.EXAMPLES):
            (Path(scratch) / str(number)).write_bytes(b"\1" + encode_call(call))
        every = _PARTING.join(b"\1" + encode_call(call) for call in test_interface.EXAMPLES)
        (Path(scratch) / "all").write_bytes(every)
        atheris.Setup([*sys.argv, scratch, "-max_len=8000"], run_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
