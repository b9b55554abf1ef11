"""What an enclave asks of its host's quoting process, and the answers, over one stream socket; without I/O.

     0               4                                     0               4        5
    +---------------+------------------ - - -+            +---------------+--------+------------------ - - -+
    |    length     |  question (JSON)       |            |    length     | status |  bundle, or JSON error |
    +---------------+------------------ - - -+            +---------------+--------+------------------ - - -+

`length` (u32, big-endian) counts what follows. Status 0 brings a bundle, 1 an error: {"code", "detail"}.

    {"want":"policy"}                                      expectations, reference values, collateral of this host
    {"user_data":"<hex>","vm":"<name>","want":"evidence"}  the REPORT of the seed; the answer is the QUOTE with all logs
    {"credential":"<hex>","want":"activation"}             the agent's, in a pairing; the answer is the secret inside
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from sealane.attest.bundle import encode_bundle, parse_bundle
from sealane.attest.reading import decode_text, parse_hex, parse_json
from sealane.errors import EvidenceError, InternalError, SealaneError, make_error
from sealane.limits import EVIDENCE_MAX

_LENGTH: Final = struct.Struct(">I")
QUESTION_MAX: Final = 4096
ANSWER_MAX: Final = EVIDENCE_MAX + 1
USER_DATA_MAX: Final = 64  # REPORTDATA of a TEE; a TPM takes as much


@dataclass(frozen=True)
class PolicyWanted:
    """What this host expects of peers."""


@dataclass(frozen=True)
class EvidenceAsked:
    """Have the root of trust quote these user data, with QEMU of this VM in the log."""

    user_data: bytes
    vm: str


@dataclass(frozen=True)
class ActivationAsked:
    """What this host's TPM finds in a credential that another host made for its keys (`quoting.enrolment`)."""

    credential: bytes


Question: TypeAlias = PolicyWanted | EvidenceAsked | ActivationAsked


class Cutter:
    """Cuts a byte stream into what its lengths say; raises InternalError beyond `maximum`: both ends are our own."""

    def __init__(self, maximum: int) -> None:
        self._buffer, self._maximum = bytearray(), maximum

    def receive(self, data: bytes) -> list[bytes]:
        """Every part that `data` completes."""
        self._buffer += data
        parts = []
        while len(self._buffer) >= _LENGTH.size:
            length = _LENGTH.unpack_from(self._buffer)[0]
            if not 1 <= length <= self._maximum:
                raise InternalError("internal.error", f"{length} bytes between enclave and quoting process")
            if len(self._buffer) < _LENGTH.size + length:
                break
            parts.append(bytes(self._buffer[_LENGTH.size : _LENGTH.size + length]))
            del self._buffer[: _LENGTH.size + length]
        return parts


def encode_question(question: Question) -> bytes:
    """The question as it travels."""
    fields = {"want": "policy"}
    if isinstance(question, EvidenceAsked):
        fields = {"user_data": question.user_data.hex(), "vm": question.vm, "want": "evidence"}
    elif isinstance(question, ActivationAsked):
        fields = {"credential": question.credential.hex(), "want": "activation"}
    text = json.dumps(fields, sort_keys=True).encode()
    return _LENGTH.pack(len(text)) + text


def parse_question(text: bytes) -> Question:
    """Read untrusted bytes, an enclave's; raises EvidenceError."""
    value = parse_json(decode_text(text, "question"), "question")
    if value == {"want": "policy"}:
        return PolicyWanted()
    if isinstance(value, dict) and set(value) == {"credential", "want"} and value["want"] == "activation":
        return ActivationAsked(parse_hex(value["credential"], "credential"))
    if not isinstance(value, dict) or set(value) != {"user_data", "vm", "want"} or value["want"] != "evidence":
        raise EvidenceError("attest.malformed", "a question that is not known")
    user_data, vm = parse_hex(value["user_data"], "user data"), value["vm"]
    if not isinstance(vm, str) or len(vm) > USER_DATA_MAX or not 1 <= len(user_data) <= USER_DATA_MAX:
        raise EvidenceError("attest.malformed", "user data or VM cannot be")
    return EvidenceAsked(user_data, vm)


def encode_answer(answer: Mapping[str, bytes] | SealaneError) -> bytes:
    """A bundle, or why there is none."""
    if isinstance(answer, SealaneError):
        body = b"\x01" + json.dumps({"code": answer.code, "detail": answer.detail[:1000]}).encode()
    else:
        body = b"\x00" + encode_bundle(answer)
    return _LENGTH.pack(len(body)) + body


def parse_answer(body: bytes) -> dict[str, bytes]:
    """The bundle; raises the error that came in its place, or EvidenceError."""
    if body[0] == 0:
        return parse_bundle(body[1:])
    value = parse_json(decode_text(body[1:], "answer"), "answer")
    if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in ("code", "detail")):
        raise EvidenceError("attest.malformed", "an answer that is not known")
    raise make_error(value["code"], value["detail"])
