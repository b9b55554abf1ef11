"""A QEMU that ends while somebody asks it: told as any other failure, and nothing is left open."""

import os
import socket
import threading
from pathlib import Path

import pytest

from sealane.testing.problems import RigError
from sealane.testing.qmp import Qmp


@pytest.mark.parametrize("says", [b"", b'{"QMP": {}}\n'], ids=["no-greeting", "greeting-alone"])
def test_a_qemu_that_ends_as_it_is_asked(tmp_path: Path, says: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "q"))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            connection.shutdown(socket.SHUT_RD)  # what is sent to it from now on is a broken pipe
            connection.sendall(says)
            connection.close()

        before = os.listdir("/proc/self/fd")
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(RigError, match="closed its monitor"):
            Qmp(tmp_path / "q")
        thread.join()
        assert os.listdir("/proc/self/fd") == before
