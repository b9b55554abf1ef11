"""Evidence that others' hardware made, where the shared vectors lie beside the checkout; it is not part of this project."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from sealane.attest.appraise import Material, appraise
from sealane.attest.reasons import Level, Severity
from sealane.attest.verdict import Verdict

VECTORS = Path(__file__).parents[3] / "shared/vectors"
pytestmark = pytest.mark.skipif(not VECTORS.is_dir(), reason="no shared vectors beside the checkout")

IN_WINDOW = datetime(2025, 6, 25, 10, tzinfo=UTC)
BEFORE_WINDOW = datetime(2025, 6, 19, 9, tzinfo=UTC)
AFTER_WINDOW = datetime(2025, 8, 19, tzinfo=UTC)


def verdict(*names: str, at: datetime = IN_WINDOW, flip: int | None = None) -> Verdict:
    """What is made of these files; `flip` changes one bit of the first one's byte there."""
    material = Material()
    for number, name in enumerate(names):
        data = bytearray((VECTORS / name).read_bytes())
        if not number and flip is not None:
            data[flip] ^= 1
        material.add(name, bytes(data))
    return appraise(material, now=at)


def refusals(judged: Verdict) -> set[str]:
    return {reason.code for reason in judged.reasons if reason.severity is Severity.REFUSAL}


@pytest.mark.parametrize("kind", ["sgx", "tdx"])
def test_quote_with_its_collateral_is_accepted_in_its_window_alone(kind: str) -> None:
    files = (f"attestation/{kind}_quote", f"attestation/{kind}_quote_collateral.json")
    judged = verdict(*files)
    assert refusals(judged) == set()
    assert judged.level == Level.IDENTITY  # no reference value says what should run
    assert "collateral.not-yet-valid" in refusals(verdict(*files, at=BEFORE_WINDOW))
    assert "collateral.expired" in refusals(verdict(*files, at=AFTER_WINDOW))


@pytest.mark.parametrize("kind", ["sgx", "tdx"])
@pytest.mark.parametrize("at", [60, 112, 300, 400])
def test_changed_quote_is_refused(kind: str, at: int) -> None:
    files = (f"attestation/{kind}_quote", f"attestation/{kind}_quote_collateral.json")
    assert refusals(verdict(*files, flip=at))


def test_quote_without_collateral_is_refused() -> None:
    assert {"collateral.missing", "crl.missing"} <= refusals(verdict("attestation/tdx_quote"))
    production = refusals(
        verdict("attestation/tdx_prod_quote_SPR_E4.dat", "attestation/pckcrl", "attestation/rootcrl.der")
    )
    assert "collateral.missing" in production


def test_snp_report_whose_policy_allows_debugging_is_refused() -> None:
    files = ("attestation/snp_attestation.bin", "attestation/snp_vcek.testcer", "attestation/snp_milan.testcer")
    assert refusals(verdict(*files, at=datetime(2023, 1, 1, tzinfo=UTC))) == {"tee.debug"}


def test_snp_report_without_its_chain_is_refused() -> None:
    assert refusals(verdict("attestation/snp_v3_report.bin", "attestation/snp_v3_vcek.der")) == {"chain.missing"}


@pytest.mark.parametrize("name", ["binary_bios_measurements", "ima-log-sha1", "ima-log-sha256", "ima-log-sha384"])
def test_log_without_a_quote_proves_nothing(name: str) -> None:
    judged = verdict(f"eventlog/{name}")
    assert judged.level == Level.NOTHING
    assert any(reason.code.endswith(".unquoted") for reason in judged.reasons)
