"""A QEMU that believes in a postcopy which began nowhere else runs its VM again, with its disks or not at all."""

from pathlib import Path
from typing import Any, cast

import pytest

from sealane.errors import SealaneError
from sealane.hypervisor.qmp import QmpMachine
from sealane.hypervisor.qmp_connection import QmpConnection
from sealane.hypervisor.unshared import IN_POSTCOPY, believes_in_postcopy, run_unshared
from tests.hypervisor.machines import skip_without_qemu
from tests.hypervisor.strands import unshared_switch
from tests.hypervisor.test_stranded import Monitor, played

QEMUS = skip_without_qemu()
QEMU = QEMUS[-1]
DISK_BYTES = 1 << 20


def disks(directory: Path) -> list[str]:
    """Two disks with a node below each; the guest may write to one of them."""
    words: list[str] = []
    for name, is_fixed in (("data", "off"), ("cdrom", "on")):
        image = directory / name
        image.write_bytes(bytes(DISK_BYTES))
        words += ["-blockdev", f"driver=file,node-name={name}-file,filename={image},read-only={is_fixed}"]
        words += ["-blockdev", f"driver=raw,node-name={name},file={name}-file,read-only={is_fixed}"]
        words += ["-device", f"virtio-blk-pci,drive={name}"]
    return words


async def active_nodes(source: QmpMachine) -> dict[str, object]:
    nodes: Any = await source.execute("query-named-block-nodes")
    return {node["node-name"]: node.get("active") for node in nodes}


@pytest.mark.e2e
async def test_it_runs_again_with_its_disks(tmp_path: Path) -> None:
    async with unshared_switch(QEMU, tmp_path, *disks(tmp_path)) as source:
        await source.pause_postcopy()
        assert await source.believes_in_postcopy()
        before = await active_nodes(source)
        if "blockdev-set-active" not in str(await source.execute("query-commands")):
            pytest.skip("no QEMU from 10.0 on here")
        assert before.keys() == {"data", "data-file", "cdrom", "cdrom-file"}
        assert set(before.values()) == {False}
        for command in ("cont", "migrate_cancel"):
            with pytest.raises(SealaneError, match=r"vm\.qmp"):
                await source.execute(command)
        await source.run_unshared()
        assert await source.run_state() == "running"
        assert set((await active_nodes(source)).values()) == {True}
        await source.run_unshared()
        # as any VM that runs
        await source.stop()
        await source.resume()
        await source.execute("system_reset")
        assert await source.run_state() == "running"
        assert "s.gdb" not in [path.name for path in tmp_path.iterdir()]
        # but it cannot be migrated, and says why
        assert (await source.describe()).migration_status == "postcopy-paused"
        with pytest.raises(SealaneError, match="migration process in progress"):
            await source.migrate(f"unix:{tmp_path / 'n'}")
        await source.quit()


@pytest.mark.e2e
@pytest.mark.parametrize("qemu", QEMUS)
async def test_one_that_has_not_seen_yet_that_its_lanes_are_gone_is_paused_first(tmp_path: Path, qemu: str) -> None:
    async with unshared_switch(qemu, tmp_path) as source:
        await source.run_unshared()
        assert await source.run_state() == "running"
        assert (await source.migration_status()).status == "postcopy-paused"


@pytest.mark.e2e
async def test_before_10_0_disks_that_were_given_up_keep_it_paused(tmp_path: Path) -> None:
    old = QEMUS[0]
    async with unshared_switch(old, tmp_path, *disks(tmp_path)) as source:
        if "blockdev-set-active" in str(await source.execute("query-commands")):
            pytest.skip("no QEMU before 10.0 here")
        with pytest.raises(SealaneError, match=r"before 10\.0.*vm\.qmp"):
            await source.run_unshared()
        assert await source.run_state() == "finish-migrate"
        assert (await source.migration_status()).status == "postcopy-paused"


class Sleeping(Monitor):
    """A QEMU whose postcopy is paused; what it was told, its disks included. They are its own again when it was asked for them."""

    def __init__(self, *, becomes: object = True, **answers: Any) -> None:
        super().__init__(query_migrate={"status": "postcopy-paused"}, query_named_block_nodes=[{"active": False}])
        self.answers |= answers
        self.becomes = becomes

    async def execute(self, command: str, arguments: Any = None) -> object:
        if command != "blockdev-set-active":
            return await super().execute(command, arguments)
        assert arguments == {"active": True}
        self.told.append(command)
        self.answers["query_named_block_nodes"] = [{"active": True}, {"active": self.becomes}]
        return {}


@pytest.mark.parametrize(
    "status", sorted({"none", "active", "device", "failed", "cancelling", "completed"} | IN_POSTCOPY)
)
async def test_what_believes_in_postcopy(status: str) -> None:
    assert await believes_in_postcopy(played(query_migrate={"status": status})[1]) is (status in IN_POSTCOPY)


@pytest.mark.parametrize("status", sorted({"device", "completed", None, *IN_POSTCOPY} - {"postcopy-paused"}, key=str))
async def test_a_thread_that_does_not_sleep_is_not_overtaken(tmp_path: Path, status: str | None) -> None:
    monitor = Sleeping(query_migrate={"status": status})
    with pytest.raises(SealaneError, match=rf"says of its postcopy: {status}.*vm\.qmp"):
        await run_unshared(cast(QmpConnection, monitor), str(tmp_path / "g"), 5)
    assert monitor.told == []


@pytest.mark.parametrize(
    ("becomes", "nodes", "told", "words"),
    [
        (False, [{"active": False}], ["blockdev-set-active"], "has given up its disks"),
        (True, [{"active": False}, {}], [], r"before 10\.0"),
        (True, {}, [], r"before 10\.0"),
    ],
)
async def test_disks_that_do_not_come_back_keep_it_paused(
    tmp_path: Path, becomes: bool, nodes: object, told: list[str], words: str
) -> None:
    monitor = Sleeping(becomes=becomes, query_named_block_nodes=nodes)
    with pytest.raises(SealaneError, match=rf"{words}.*vm\.qmp"):
        await run_unshared(cast(QmpConnection, monitor), str(tmp_path / "g"), 5)
    assert monitor.told == told
