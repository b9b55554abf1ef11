"""Coverage-guided fuzzing of the filter: any bytes after any beginning of a migration are refused, or are a migration's.

A long run: `python -m tests.libvirt.fuzz_filter -max_total_time=3600 fuzz-corpus`.
"""

import sys

import atheris

with atheris.instrument_imports():
    from sealane.errors import PeerError
    from sealane.libvirt.rpc import KEEPALIVE_PROGRAM, MessageReader, Procedure
    from sealane.libvirt.rpcfilter import RpcFilter
    from tests.libvirt.rig import AGREED, migration, reply

SAID = migration()


def one_input(data: bytes) -> None:
    rpc = RpcFilter(AGREED)
    begun = data[0] % len(SAID) if data else 0
    for each in SAID[:begun]:
        rpc.from_source(each)
        rpc.from_daemon(reply(int.from_bytes(each[12:16], "big"), int.from_bytes(each[20:24], "big")))
    try:
        passed = rpc.from_source(data[1:])
        rpc.from_daemon(data[1:])
    except PeerError as error:
        assert error.code in {"libvirt.refused", "libvirt.malformed"}  # noqa: PT017
        return
    for message in MessageReader().feed(passed):
        assert message.program == KEEPALIVE_PROGRAM or message.procedure in set(Procedure)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
