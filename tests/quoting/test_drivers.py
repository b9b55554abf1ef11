"""Drivers for hardware that is not at hand, on made-up file trees; and the simulated one, under the production verifier."""

import struct
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from sealane.attest.bundle import encode_bundle, parse_bundle
from sealane.attest.peer import Expectations, PeerJudge
from sealane.attest.quotes import parse_quote
from sealane.attest.reasons import Level
from sealane.attest.reference import Reference
from sealane.errors import AttestationRejected, HostError
from sealane.quoting.drivers import make_drivers
from sealane.quoting.drivers.driver import Driver
from sealane.quoting.interface import Configure, DriverName
from tests.attest.dcap_rig import NOW, DcapRig

DATA = bytes(range(1, 33))


def driver(root: Path, name: DriverName, **changes: Any) -> Driver:
    facts = {"identity_key": "", "started_ns": 0, "state": str(root), "run": str(root), "root": str(root), **changes}
    (made,) = make_drivers(Configure(drivers=[name], **facts))
    return made


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


GRAMINE = {"dev/attestation/attestation_type": b"dcap\n", "dev/attestation/quote": b"QUOTE"}
REPORT = "sys/kernel/config/tsm/report/sealane"
TDX = {
    f"{REPORT}/provider": b"tdx_guest\n",
    f"{REPORT}/outblob": b"QUOTE",
    "sys/firmware/acpi/tables/data/CCEL": b"LOG",
}
SNP = {f"{REPORT}/provider": b"sev_guest\n", f"{REPORT}/outblob": b"REPORT", f"{REPORT}/auxblob": b"TABLE"}


@pytest.mark.parametrize(
    ("name", "files", "asked", "pieces"),
    [
        ("sgx", GRAMINE, "dev/attestation/user_report_data", {"sgx.quote": b"QUOTE"}),
        ("tdx", TDX, f"{REPORT}/inblob", {"tdx.quote": b"QUOTE", "boot-log": b"LOG"}),
        ("sev-snp", SNP, f"{REPORT}/inblob", {"snp.report": b"REPORT", "snp.certificates": b"TABLE"}),
    ],
)
def test_what_is_asked_and_what_comes_back(
    tmp_path: Path, name: DriverName, files: dict[str, bytes], asked: str, pieces: dict[str, bytes]
) -> None:
    made = driver(tree(tmp_path, files), name)
    assert made.quote(DATA, b"log") == pieces
    assert (tmp_path / asked).read_bytes() == DATA + bytes(32)
    assert made.resume_log([b"a", b"b"]) == 2
    with pytest.raises(HostError, match="user data"):
        made.quote(bytes(65), b"")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("sgx", {}),
        ("sgx", {**GRAMINE, "dev/attestation/attestation_type": b"none"}),
        ("tdx", {}),
        ("tdx", SNP),
        ("sev-snp", TDX),
        ("simulated", {}),
        ("tpm2", {}),
    ],
)
def test_hardware_that_is_not_there(tmp_path: Path, name: DriverName, files: dict[str, bytes]) -> None:
    with pytest.raises(HostError) as raised:
        driver(tree(tmp_path, files), name, tcti="swtpm:path=/nowhere")
    assert raised.value.code == "quoting.driver"


def test_an_empty_quote_and_a_report_that_somebody_else_asked_for(tmp_path: Path) -> None:
    made = driver(tree(tmp_path, {**GRAMINE, "dev/attestation/quote": b""}), "sgx")
    with pytest.raises(HostError, match="empty"):
        made.quote(DATA, b"")
    made = driver(tree(tmp_path, {**SNP, f"{REPORT}/generation": b"7\n"}), "sev-snp")
    with pytest.raises(HostError, match="somebody else"):  # a file does not count up as the kernel does
        made.quote(DATA, b"")


def simulated(root: Path, rig: DcapRig) -> Driver:
    """The directory of a simulated platform, made of a rig's own quote."""
    whole = rig.quote()
    quote = parse_quote(whole)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    files = {"key.pem": rig.attestation_key.private_bytes(*form), "body": quote.signed}
    files["certification"] = whole[len(quote.signed) + 4 + 128 :]
    files |= {f"collateral.{name}": content for name, content in rig.files().items() if name != "quote"}
    return driver(root, "simulated", simulated_root=str(tree(root / "sim", files)))


@pytest.mark.parametrize("version", [3, 4])
def test_a_simulated_quote_under_the_production_verifier(tmp_path: Path, version: int) -> None:
    rig = DcapRig(version=version)
    made = simulated(tmp_path, rig)
    assert "simulated" in made.words
    pieces = parse_bundle(encode_bundle(made.quote(DATA, b"")))
    assert struct.unpack_from("<H", pieces["simulated.quote"])[0] == version
    reference = Reference.model_validate({**rig.reference().model_dump(exclude_none=True), "user_data": None})

    def judge(**wanted: Any) -> PeerJudge:
        return PeerJudge("host", "00" * 32, lambda: NOW, Expectations(**wanted), reference)

    verdict = judge(least_level=4, accepted_test_roots=[rig.root.digest]).appraise(pieces, DATA)
    assert verdict.level is Level.ISOLATED
    assert verdict.production_level is Level.NOTHING
    for wanted, data, code in (
        ({}, DATA, "attest.host-unknown"),
        ({"accepted_test_roots": [rig.root.digest]}, bytes(32) + b"x", "attest.binding"),
    ):
        with pytest.raises(AttestationRejected) as raised:
            judge(**wanted).appraise(pieces, data)
        assert raised.value.code == code
