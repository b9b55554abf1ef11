"""`sealane attest verify`: exit statuses and words, on evidence made by the tests' own roots."""

import json
from pathlib import Path

from tests.attest.tpm_rig import TpmRig
from tests.cli.conftest import Run


def test_what_is_no_evidence_is_not_understood(run: Run, tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    strange.write_bytes(b"\x00" * 100)
    told = run("attest", "verify", str(strange))
    assert told.exit_code == 2
    assert "attest.unknown-kind" in told.output


def test_a_file_that_is_missing_is_a_misuse(run: Run, tmp_path: Path) -> None:
    told = run("attest", "verify", str(tmp_path / "absent"))
    assert told.exit_code in {2, 5}
    assert "absent" in told.output


def test_a_log_alone_is_refused_with_reasons(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "ima"
    log.write_bytes(TpmRig(root="hardware").files()["ima"])
    told = run("attest", "verify", str(log), "--json", "--at", "2026-06-01T00:00:00Z")
    assert told.exit_code == 1
    facts = json.loads(told.stdout)
    assert any(reason["code"] == "ima.unquoted" for reason in facts["reasons"])
