"""What is taken out of memory, and what is not taken for something."""

import numpy as np

from sealane.lab.carve import carve, read_screen
from sealane.lab.sight import PAGE_BYTES, Sight
from tests.lab.rig import memory

TEXT = b"Report to the board. " + b"The harbour at the northern end of the bay will be sold before long. " * 8
PEM = b"-----BEGIN PRIVATE KEY-----\n" + (b"A" * 64 + b"\n") * 12 + b"-----END PRIVATE KEY-----\n"


def page(*placed: tuple[int, bytes]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    made = np.zeros((1, PAGE_BYTES), np.uint8)
    for at, data in placed:
        made[0, at : at + len(data)] = np.frombuffer(data, np.uint8)
    return made


def test_all_kinds() -> None:
    placed = page(
        (10, TEXT), (1000, PEM), (2000, b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), (3000, b"DB_PASSWORD=hunter2hunter2")
    )
    typed = page((100, b"root\n" + bytes(17) + b"correct-horse\n"))
    carved = carve(Sight(memory={"pc.ram": np.concatenate([placed, typed])}), wanted=[b"northern", b"southern"])
    assert carved.documents == [TEXT.decode()]
    assert carved.keys == [PEM.decode().strip()]
    assert carved.files == {"PNG": 1}
    assert carved.passwords == ["PASSWORD: hunter2hunter2"]
    assert carved.logins == [("root", "correct-horse")]
    assert carved.found == {"northern": ["memory pc.ram"], "southern": []}


def test_noise_holds_nothing() -> None:
    noise = np.random.default_rng(3).bytes(8 << 20)
    carved = carve(Sight(flows=[noise]), wanted=[b"secret-of-the-guest"])
    assert carved.is_empty
    assert carved.strings > 0  # chance makes some; they say nothing


def test_pages_that_others_decoded() -> None:
    assert carve(Sight(), extra=[("decoded", memory(64))]).files["ELF program"] == 1


def test_a_text_screen() -> None:
    vram = np.zeros((16, PAGE_BYTES), np.uint8)
    assert read_screen(vram) == []
    cells = vram.reshape(-1)
    cells[0 : 80 * 25 * 4 : 4], cells[1 : 80 * 25 * 4 : 4] = ord(" "), 7
    assert read_screen(vram[:2]) == []
    said = b"harbour login: root"
    cells[80 * 4 : (80 + len(said)) * 4 : 4] = np.frombuffer(said, np.uint8)
    assert read_screen(vram[:2]) == ["", said.decode()]
    assert read_screen(np.random.default_rng(1).integers(0, 256, (16, PAGE_BYTES), dtype=np.uint8)) == []
