"""What counts as read: in the capture as it is, in pages that crossed compressed, or in what was decoded."""

from pathlib import Path

import numpy as np

from sealane.lab.sight import PAGE_BYTES, Lane, Pages, Sight
from sealane.testing.lab.guest import PLACES, Secrets
from sealane.testing.lab.leak import find
from sealane.testing.lab.stage import Take

NONE = np.empty((0, PAGE_BYTES), np.uint8)


def page(text: bytes) -> Pages:
    made = np.zeros((1, PAGE_BYTES), np.uint8)
    made[0, 100 : 100 + len(text)] = np.frombuffer(text, np.uint8)
    return made


def take(sight: Sight) -> Take:
    return Take("hrt", True, 1.0, [], Path(), _sight=sight)


def test_where_a_secret_is_found() -> None:
    assert find(take(Sight(flows=[b"... a-secret ..."])), NONE, "a-secret") == "read"
    assert find(take(Sight(flows=[b"compressed"], lanes=[Lane(clear=[page(b"a-secret")])])), NONE, "a-secret") == "read"
    assert find(take(Sight(flows=[b"noise"])), page(b"a-secret"), "a-secret") == "decoded"
    assert find(take(Sight(flows=[b"noise"], lanes=[Lane(coded=[page(b"a-secret")])])), NONE, "b-secret") == "-"


def test_secrets_are_distinct() -> None:
    secrets = Secrets(7)
    words = [*secrets.canaries.values(), secrets.document_word, secrets.pem_line]
    assert len({word[:16] for word in words}) == len(words) == len(PLACES) + 4
    assert Secrets(8).canaries != secrets.canaries
