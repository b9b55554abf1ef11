"""The key schedule: rekeying, nonces that never repeat, and known answers made a second way."""

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sealane.crypto.aead import Aead
from sealane.seal import keys as schedule
from sealane.seal.keys import Direction, lane_token
from sealane.seal.records import RecordReader, RecordSealer
from tests.seal.rig import HEADER, SECRET, feed, forge, keys, read, records, seal_all

VECTORS = Path(__file__).with_name("vectors.json")


class Recorder(Aead):
    """AES-256-GCM that remembers under which key and nonce it sealed."""

    used: list[tuple[bytes, bytes]]

    def __init__(self, key: bytes) -> None:
        super().__init__(key)
        self._remembered_key = key

    def seal_into(self, nonce: bytes, plaintext: Any, associated_data: Any, out: Any) -> int:
        self.used.append((self._remembered_key, nonce))
        return super().seal_into(nonce, plaintext, associated_data, out)


@pytest.fixture
def small_generations(monkeypatch: pytest.MonkeyPatch) -> int:
    """Three records a key."""
    monkeypatch.setattr(schedule, "RECORDS_PER_KEY", 3)
    return 3


def test_rekeying_goes_unnoticed_and_the_sequence_goes_on(small_generations: int) -> None:
    payloads = [bytes([n]) * (n + 1) for n in range(10)]
    sealer = RecordSealer(keys())
    sealed = seal_all(sealer, payloads)
    assert [HEADER.unpack(record[: HEADER.size])[4] for record in sealed] == list(range(12))
    for plan in ([], [1], [100]):
        reader = RecordReader(keys())
        told = feed(reader, b"".join(sealed), plan)
        assert told.error is None
        assert told.events == ["opened", *payloads, "closed"]
        assert reader.digest == sealer.digest


def test_generations_have_keys_of_their_own_and_no_nonce_repeats(
    small_generations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorder.used = []
    monkeypatch.setattr(schedule, "Aead", Recorder)
    for lane in range(3):
        for direction in Direction:
            seal_all(RecordSealer(keys(lane=lane, direction=direction)), [b"x"] * 10)
    used = Recorder.used
    assert len(used) == 3 * 2 * 12
    assert len(set(used)) == len(used)
    per_key = {key: sum(other == key for other, _ in used) for key, _ in used}
    assert len(per_key) == 3 * 2 * 4
    assert set(per_key.values()) == {small_generations}


def test_a_record_of_another_generation_does_not_open(small_generations: int) -> None:
    sealed = records(*[bytes([n]) for n in range(6)])  # sequence numbers 0 to 7, generations 0 to 2
    told = read(b"".join(sealed[:4]) + sealed[1])
    assert (told.events, told.code) == (["opened", b"\0", b"\1", b"\2"], "lane.integrity")
    told = read(sealed[0] + sealed[4])
    assert (told.events, told.code) == (["opened"], "lane.integrity")


def test_a_generation_is_left_for_good(small_generations: int) -> None:
    moving = keys()
    assert moving.covers(2)
    assert not moving.covers(3)
    moving.at(3)
    assert moving.covers(3)
    assert not moving.covers(2)


def test_repr_shows_a_label_and_no_key() -> None:
    assert repr(keys(lane=7)) == "LaneKeys(lane 7 TO_DESTINATION, generation 0)"
    assert repr(Aead(bytes(32))) == "Aead(AES-256-GCM)"
    with pytest.raises(ValueError, match="32 bytes"):
        Aead(bytes(16))


# ---- known answers; `python -m tests.seal.test_keys` writes them anew, which a change of protocol version must do


def _expand(secret: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand as RFC 5869, 2.3 has it, with nothing but the standard library."""
    output, block = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.new(secret, block + info + bytes([counter]), hashlib.sha256).digest()
        output += block
    return output[:length]


def _schedule_by_hand(secret: bytes, lane: int, direction: int) -> dict[str, Any]:
    lane_secret = _expand(secret, b"sealane v1 lane" + lane.to_bytes(2, "big") + bytes([direction]), 32)
    generation = _expand(lane_secret, b"secret", 32)
    generations = []
    for _ in range(3):
        generations.append({"key": _expand(generation, b"key", 32).hex(), "iv": _expand(generation, b"iv", 12).hex()})
        generation = _expand(generation, b"next", 32)
    identifier = _expand(lane_secret, b"identifier", 8).hex()
    return {"lane": lane, "direction": direction, "identifier": identifier, "generations": generations}


def _record_by_hand(keys_of_lane: dict[str, Any], sequence: int, kind: int, payload: bytes) -> bytes:
    generation = keys_of_lane["generations"][sequence >> 18]
    header = HEADER.pack(kind, 0, 0, len(payload), sequence, bytes.fromhex(keys_of_lane["identifier"]))
    nonce = (int(generation["iv"], 16) ^ sequence).to_bytes(12, "big")
    return header + AESGCM(bytes.fromhex(generation["key"])).encrypt(nonce, payload, header)


def regenerate() -> dict[str, Any]:
    """The vectors, made without Sealane's code."""
    lanes = [_schedule_by_hand(SECRET, lane, direction) for lane in (0, 1, 33) for direction in (0, 1)]
    payload = b"a page of a guest"
    sealed = [
        _record_by_hand(lanes[0], n, kind, body) for n, (kind, body) in enumerate([(1, b""), (2, payload), (3, b"")])
    ]
    late = _record_by_hand(lanes[0], 1 << 18, 2, payload)
    digest = hashlib.sha256(b"".join(record[:24] + record[-16:] for record in sealed)).hexdigest()
    return {
        "provenance": "tests/seal/test_keys.py: HKDF-Expand of the standard library's HMAC, AES-256-GCM of cryptography",
        "migration_secret": SECRET.hex(),
        "lanes": lanes,
        "tokens": {
            lane: _expand(SECRET, b"sealane v1 lane token" + lane.to_bytes(2, "big"), 16).hex() for lane in (0, 1, 33)
        },
        "payload": payload.hex(),
        "records_of_lane_0": [record.hex() for record in sealed],
        "first_record_of_generation_1": late.hex(),
        "digest": digest,
    }


def test_vectors_are_what_is_computed_by_hand() -> None:
    assert VECTORS.read_text() == json.dumps(regenerate(), indent=1) + "\n"


def test_sealane_makes_the_same_records_as_the_vectors() -> None:
    vectors = json.loads(VECTORS.read_text())
    sealer = RecordSealer(keys(bytes.fromhex(vectors["migration_secret"])))
    payload = bytes.fromhex(vectors["payload"])
    assert [record.hex() for record in seal_all(sealer, [payload])] == vectors["records_of_lane_0"]
    assert sealer.digest.hex() == vectors["digest"]
    assert forge(2, 1 << 18, payload).hex() == vectors["first_record_of_generation_1"]
    for number, token in vectors["tokens"].items():
        assert lane_token(SECRET, int(number)).hex() == token
    for lane in vectors["lanes"]:
        own = keys(bytes.fromhex(vectors["migration_secret"]), lane["lane"], Direction(lane["direction"]))
        assert own.identifier.hex() == lane["identifier"]
        for number, generation in enumerate(lane["generations"]):
            sequence = number << 18
            cipher, sealed = own.at(sequence), bytearray(16)
            assert own.nonce(0).hex() == generation["iv"]
            cipher.seal_into(bytes(12), b"", b"", sealed)
            assert bytes(sealed) == AESGCM(bytes.fromhex(generation["key"])).encrypt(bytes(12), b"", b"")


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(regenerate(), indent=1) + "\n")
