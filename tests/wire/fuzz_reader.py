"""Coverage-guided fuzzing of the readers: `python -m tests.wire.fuzz_reader [libFuzzer's options] [DIRECTORY]`.

For example an hour, with a corpus that is kept: `-max_total_time=3600 fuzz-corpus`. Without a directory it begins with
the made-up streams. The first byte of an input chooses the reader and how its bytes are cut.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sealane.wire"]):
    from tests.wire import rig, test_readers

KINDS = sorted(test_readers.MADE)


def run_one(data: bytes) -> None:
    if not data:
        return
    kind = KINDS[data[0] % len(KINDS)]
    stream = data[1:]
    step = max(1, data[0] >> 2) * 13
    test_readers.check_everything(test_readers.MADE[kind][0], stream, list(range(step, len(stream), step)))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        seeds = Path(scratch)
        for number, kind in enumerate(KINDS):
            stream = test_readers.MADE[kind][1]
            (seeds / kind).write_bytes(bytes([number + 16]) + stream)
            # the same with pages of one word only: what is interesting is nearer together
            (seeds / f"{kind}-heads").write_bytes(bytes([number + 64]) + stream.replace(rig.page(0)[:4096], b""))
        atheris.Setup([*sys.argv, str(seeds), "-max_len=40000"], run_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
