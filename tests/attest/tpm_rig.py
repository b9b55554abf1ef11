"""A simulated TPM: boot log, IMA log, PCRs and quotes that belong together, with a knob for each thing."""

import hashlib
import struct
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from sealane.attest.appraise import Material, appraise
from sealane.attest.reference import Reference
from sealane.attest.verdict import Verdict
from tests.attest.dcap_rig import NOW

NONCE = bytes(range(1, 33))
PCRS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
ALGORITHMS = {"sha1": 0x0004, "sha256": 0x000B}
FILES = (("/usr/bin/qemu-system-x86_64", "11" * 32), ("/usr/lib/libsealane.so", "22" * 32))
AK_ATTRIBUTES = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 16 | 1 << 18


def sized(data: bytes, size: int = 2) -> bytes:
    return len(data).to_bytes(size, "big") + data


def secure_boot_variable(on: bool) -> bytes:
    name = "SecureBoot".encode("utf-16-le")
    return bytes(16) + struct.pack("<QQ", 10, 1) + name + bytes([on])


def boot_events() -> list[tuple[int, int, bytes]]:
    events = [(0, 0x08, b"1.0\0\0"), (7, 0x80000001, secure_boot_variable(True))]
    events += [(pcr, 0x04, bytes(4)) for pcr in range(8)]
    return [*events, (4, 0x80000003, b"loader"), (8, 0x0D, b"kernel command line"), (9, 0x0D, b"initrd")]


def encode_event_log(events: list[tuple[int, int, bytes]], names: tuple[str, ...] = ("sha1", "sha256")) -> bytes:
    sizes = b"".join(struct.pack("<HH", ALGORITHMS[name], hashlib.new(name).digest_size) for name in names)
    spec = b"Spec ID Event03\0" + struct.pack("<I4B", 0, 0, 2, 0, 2) + struct.pack("<I", len(names)) + sizes + b"\0"
    log = struct.pack("<II20xI", 0, 3, len(spec)) + spec
    for pcr, kind, data in events:
        digests = b"".join(
            struct.pack("<H", ALGORITHMS[n]) + hashlib.new(n, measured(kind, data)).digest() for n in names
        )
        log += struct.pack("<III", pcr, kind, len(names)) + digests + struct.pack("<I", len(data)) + data
    return log


def encode_legacy_log(events: list[tuple[int, int, bytes]]) -> bytes:
    return b"".join(
        struct.pack("<II", pcr, kind)
        + hashlib.sha1(measured(kind, data)).digest()
        + struct.pack("<I", len(data))
        + data
        for pcr, kind, data in events
    )


def measured(kind: int, data: bytes) -> bytes:
    """What a digest is over: the data, or for images and commands something that the data only describes."""
    return b"image of " + data if kind in {0x0D, 0x80000003} else data


def replay(events: list[tuple[int, int, bytes]], name: str) -> dict[int, bytes]:
    size = hashlib.new(name).digest_size
    values = {pcr: bytes(size) for pcr in range(16)}
    for pcr, kind, data in events:
        values[pcr] = hashlib.new(name, values[pcr] + hashlib.new(name, measured(kind, data)).digest()).digest()
    return values


def ima_encoded(algorithm: str, digest: str, name: str, signature: bytes | None = None) -> bytes:
    fields = [algorithm.encode() + b":\0" + bytes.fromhex(digest), name.encode() + b"\0"]
    fields += [] if signature is None else [signature]
    return b"".join(struct.pack("<I", len(one)) + one for one in fields)


@dataclass
class TpmRig:
    """One boot of one host, and one quote of it."""

    events: list[tuple[int, int, bytes]] = field(default_factory=boot_events)
    told_events: list[tuple[int, int, bytes]] | None = None
    files_run: tuple[tuple[str, str], ...] = FILES
    file_algorithm: str = "sha256"
    ima_lines: list[str] | None = None
    aggregate: str | None = None
    violation: bool = False
    padded: bool = False
    bank: str = "sha256"
    pcrs: tuple[int, ...] = PCRS
    nonce: bytes = NONCE
    rsa: bool = False
    pss: bool = False
    attributes: int = AK_ATTRIBUTES
    spoil: bool = False
    safe: int = 1
    quote_after: int | None = None
    legacy: bool = False
    hash_id: int = 0x000B
    leave_out: tuple[str, ...] = ("values",)
    values: dict[int, bytes] | None = None
    root: str = "software"
    platform: tuple[bytes, ...] = ()
    told_platform: bytes | None = None

    def __post_init__(self) -> None:
        self.key: Any = (
            rsa.generate_private_key(65537, 2048) if self.rsa or self.pss else ec.generate_private_key(ec.SECP256R1())
        )

    @property
    def digest(self) -> str:
        form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(self.key.public_key().public_bytes(*form)).hexdigest()

    def measurements(self) -> list[tuple[bytes, str]]:
        """What is extended for each IMA entry, and its line."""
        boot = replay(self.events, "sha256")
        aggregate = self.aggregate or hashlib.sha256(b"".join(boot[pcr] for pcr in range(10))).hexdigest()
        entries = [("sha256", "boot_aggregate", aggregate)]
        entries += [(self.file_algorithm, name, digest) for name, digest in self.files_run]
        found = []
        for algorithm, name, digest in entries:
            encoded = ima_encoded(algorithm, digest, name)
            template = hashlib.sha1(encoded).hexdigest()
            found.append((encoded, f"10 {template} ima-ng {algorithm}:{digest} {name}"))
        if self.violation:
            zeros = ima_encoded("sha256", "00" * 32, "/etc/open")
            found.append((b"", f"10 {'0' * 40} ima-ng sha256:{'00' * 32} /etc/open"))
            assert zeros
        return found

    def pcr_values(self) -> dict[int, bytes]:
        values = replay(self.events, self.bank)
        size = hashlib.new(self.bank).digest_size
        for encoded, _ in self.measurements()[: self.quote_after]:
            step = hashlib.new(self.bank, encoded).digest() if encoded else b"\xff" * size
            if self.padded and encoded:
                step = hashlib.sha1(encoded).digest().ljust(size, b"\0")
            values[10] = hashlib.new(self.bank, values[10] + step).digest()
        for line in self.platform:
            values[13] = hashlib.new(self.bank, values[13] + hashlib.new(self.bank, line).digest()).digest()
        return values

    def quote(self) -> bytes:
        values = self.pcr_values()
        bits = bytearray(3)
        for pcr in self.pcrs:
            bits[pcr // 8] |= 1 << pcr % 8
        selection = struct.pack(">IHB", 1, ALGORITHMS[self.bank], 3) + bytes(bits)
        digest = hashlib.sha256(b"".join(values[pcr] for pcr in sorted(self.pcrs))).digest()
        head = b"\xffTCG\x80\x18" + sized(b"\x00\x0b" + bytes(32)) + sized(self.nonce)
        return head + struct.pack(">QIIBQ", 1000, 5, 2, self.safe, 0x20200101) + selection + sized(digest)

    def signature(self, message: bytes) -> bytes:
        message = message + b"!" if self.spoil else message
        if self.pss or self.rsa:
            form: Any = padding.PKCS1v15()
            if self.pss:
                form = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH)
            scheme = 0x0016 if self.pss else 0x0014
            return struct.pack(">HH", scheme, self.hash_id) + sized(self.key.sign(message, form, hashes.SHA256()))
        r, s = utils.decode_dss_signature(self.key.sign(message, ec.ECDSA(hashes.SHA256())))
        return struct.pack(">HH", 0x0018, self.hash_id) + sized(r.to_bytes(32, "big")) + sized(s.to_bytes(32, "big"))

    def public(self) -> bytes:
        numbers = self.key.public_key().public_numbers()
        if self.rsa or self.pss:
            area = (
                struct.pack(">HHI", 1, 0x000B, self.attributes)
                + sized(b"")
                + struct.pack(">HHHHI", 16, 20, 11, 2048, 0)
            )
            area += sized(numbers.n.to_bytes(256, "big"))
        else:
            area = (
                struct.pack(">HHI", 0x23, 0x000B, self.attributes)
                + sized(b"")
                + struct.pack(">HHHHH", 16, 24, 11, 3, 16)
            )
            area += sized(numbers.x.to_bytes(32, "big")) + sized(numbers.y.to_bytes(32, "big"))
        return sized(area)

    def files(self) -> dict[str, bytes]:
        quote = self.quote()
        lines = self.ima_lines if self.ima_lines is not None else [line for _, line in self.measurements()]
        told = self.told_events if self.told_events is not None else self.events
        values = self.values or self.pcr_values()
        pcrs = ", ".join(f'"{pcr}": "{value.hex()}"' for pcr, value in values.items())
        files = {
            "quote": quote,
            "signature": self.signature(quote),
            "key": self.public(),
            "boot": encode_legacy_log(told) if self.legacy else encode_event_log(told),
            "ima": "".join(f"{line}\n" for line in lines).encode(),
            "platform": self.told_platform or b"".join(line + b"\n" for line in self.platform),
            "values": f'{{"pcrs": {{"{self.bank}": {{{pcrs}}}}}}}'.encode(),
        }
        return {name: data for name, data in files.items() if name not in self.leave_out and data}

    def reference(self, **changes: Any) -> Reference:
        pcrs = {str(pcr): [value.hex()] for pcr, value in replay(self.events, "sha256").items() if pcr < 10}
        tpm = {"keys": [{"digest": self.digest, "root": self.root, "name": "host-a"}], "pcrs": {"sha256": pcrs}}
        values: dict[str, Any] = {
            "version": 1, "user_data": NONCE.hex(), "hosts": [f"ak:{self.digest}"], "accept_test_roots": True,
            "ima": {"digests": [f"{self.file_algorithm}:{digest}" for _, digest in FILES]},
            "tpm": {**tpm, **changes.pop("tpm", {})},
        }  # fmt: skip
        return Reference.model_validate({**values, **changes})

    def verdict(self, reference: Reference | None = None) -> Verdict:
        material = Material()
        for name, data in self.files().items():
            material.add(name, data)
        return appraise(material, reference or self.reference(), now=NOW)
