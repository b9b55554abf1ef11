"""The recorder itself, with the QEMUs that are here: what it records now is as good as what is kept."""

import json
from pathlib import Path

import pytest
import zstandard

from sealane.testing.captures import SCENARIOS, record
from sealane.testing.qemu import QemuBinary, all_qemus
from sealane.wire import MultifdReader, RamRebuild, StreamReader
from sealane.wire.order import in_order
from tests.wire.rig import read

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("qemu", all_qemus(), ids=str)
@pytest.mark.parametrize("name", ["single-pc", "multifd-zstd"])
def test_a_recorded_stream_gives_the_source_s_ram(tmp_path: Path, qemu: QemuBinary, name: str) -> None:
    scenario = next(one for one in SCENARIOS if one.name == name and one.fits(qemu))
    made = record(scenario, qemu, tmp_path)
    main, *channels = [
        zstandard.ZstdDecompressor().decompress(path.read_bytes()) for path in sorted(made.glob("[0-9]*.zst"))
    ]
    streams = [iter(read(MultifdReader(), [data])[0]) for data in channels]
    rebuild = RamRebuild()
    for connection, event in in_order(iter(read(StreamReader(), [main])[0]), streams):
        rebuild.apply(event, connection=connection)
    rebuilt = {block.name: block.sha256 for block in rebuild.digests()}
    truth = truth_of(made)
    assert {block: rebuilt[block] for block in truth} == truth
    assert "pc.ram" in truth


def truth_of(made: Path) -> dict[str, str]:
    told = json.loads((made / "provenance.json").read_text())
    return {name: facts["sha256"] for name, facts in told["blocks"].items()}
