"""The files of expectations: looked at before they are needed, each fault told with its file and its line."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sealane.attest.reference import PAYLOAD_TYPE
from sealane.crypto.dsse import pre_authentication_encoding
from sealane.errors import SealaneError
from sealane.host.config import AttestationSettings
from sealane.host.quoting import check_expected
from sealane.paths import Paths
from sealane.quoting.expected import Checked, ExpectedFiles, check_files
from sealane.quoting.interface import Configure
from sealane.quoting.process import Platform
from tests.attest.dcap_rig import certify

KEY = Ed25519PrivateKey.generate()
GOOD = {"version": 1, "tpm": {"keys": [{"digest": "11" * 32, "root": "software"}]}, "test_roots": ["22" * 32]}
BROKEN = '{"version": 1,\n "hosts": ["ak:00"],\n "minimum_level": 7}'


def signed(value: object, key: Ed25519PrivateKey = KEY) -> str:
    payload = value.encode() if isinstance(value, str) else json.dumps(value).encode()
    signature = key.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
    signatures = [{"keyid": "", "sig": base64.b64encode(signature).decode()}]
    return json.dumps(
        {"payloadType": PAYLOAD_TYPE, "payload": base64.b64encode(payload).decode(), "signatures": signatures}
    )


def public(key: Ed25519PrivateKey = KEY) -> str:
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return key.public_key().public_bytes(*form).decode()


Files = Callable[..., ExpectedFiles]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Writes files of these contents and names them by their settings."""

    def write(**contents: Any) -> ExpectedFiles:
        named: dict[str, Any] = {}
        for setting, content in contents.items():
            path = tmp_path / setting
            path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
            named[setting] = str(path) if setting.startswith("reference") else [str(path)]
        return ExpectedFiles(**named)

    return write


def look(files: ExpectedFiles, state: Path = Path("/nonexistent")) -> Checked:
    (found,) = check_files(files, state)
    return found


def test_good_files_say_what_they_hold(files: Files) -> None:
    plain = look(files(reference_values=json.dumps(GOOD)))
    assert plain.words == "not signed; 1 keys of TPMs, 1 of them software TPMs, 1 test roots"
    under_key = look(files(reference_values=signed(GOOD), reference_key=public()))
    assert "; 1 keys of TPMs" in under_key.words
    assert under_key.words.startswith("signed under /")
    assert look(files(tpm_roots=certify("Root", None).pem)).words == "1 certificates"
    assert look(files(collateral=certify("Root", None).pem)).words == "certificates"
    assert list(check_files(ExpectedFiles(), Path("/nonexistent"))) == []


@pytest.mark.parametrize(
    ("contents", "code", "words"),
    [
        ({"reference_values": BROKEN}, "attest.reference", "reference_values: line 3: minimum_level"),
        ({"reference_values": "version = 1\nhosts = 5\n"}, "attest.reference", "reference_values: line 2: hosts"),
        ({"reference_values": "version = 1\nhosts = \n"}, "attest.reference", "line 2"),
        ({"reference_values": b"version = 1\n\xff"}, "attest.reference", "line 2"),
        ({"reference_values": ""}, "attest.reference", "line 1: version"),
        ({"reference_values": signed(BROKEN), "reference_key": public()}, "attest.reference", "line 3"),
        ({"reference_values": signed(GOOD)}, "attest.reference-signature", "reference_values: the file is signed"),
        (
            {"reference_values": json.dumps(GOOD), "reference_key": public()},
            "attest.reference-signature",
            "is not signed",
        ),
        (
            {"reference_values": signed(GOOD, Ed25519PrivateKey.generate()), "reference_key": public()},
            "attest.reference-signature",
            "reference_values: ",
        ),
        (
            {"reference_values": signed(GOOD), "reference_key": "no key"},
            "attest.reference-signature",
            "reference_key: not a",
        ),
        ({"reference_key": public()}, "attest.reference-signature", "no reference_values"),
        ({"tpm_roots": "no certificate"}, "attest.malformed", "tpm_roots: "),
        ({"collateral": "nothing known"}, "attest.unknown-kind", "collateral: "),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_line(files: Files, contents: Any, code: str, words: str) -> None:
    problem = look(files(**contents)).problem
    assert problem is not None
    assert problem.code == code
    assert words in problem.detail
    assert problem.mend


def test_what_is_kept_of_known_hosts_is_looked_at_too(tmp_path: Path) -> None:
    for text, words in (
        ("{", "fields do not fit"),
        (json.dumps({"paired": {"b": {"reference": BROKEN}}}), "b: line 3"),
    ):
        (tmp_path / "known-hosts.json").write_text(text)
        problem = look(ExpectedFiles(), tmp_path).problem
        assert problem is not None
        assert (problem.code, words in problem.detail) == ("host.store", True)


def test_an_agent_does_not_start_on_one_and_says_where_one_is_missing(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "state", tmp_path / "run", tmp_path / "config")
    path = tmp_path / "values.json"
    settings = AttestationSettings(reference_values=str(path))
    with structlog.testing.capture_logs() as logs:
        check_expected(paths, settings)
    assert [(one["log_level"], one["path"]) for one in logs] == [("error", str(path))]
    path.write_text(BROKEN)
    with pytest.raises(SealaneError, match=r"values\.json: line 3") as caught:
        check_expected(paths, settings)
    assert (caught.value.code, caught.value.exit_status) == ("attest.reference", 2)


def test_a_file_that_was_broken_since_refuses_the_next_migration_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    path.write_text(json.dumps(GOOD))
    platform = object.__new__(Platform)  # measures nothing here
    platform.configuration = Configure(
        drivers=["software"],
        identity_key="",
        started_ns=0,
        state=str(tmp_path),
        run=str(tmp_path),
        reference_values=str(path),
    )
    assert platform.policy()["reference"] == path.read_bytes()
    path.write_text(BROKEN)
    with pytest.raises(SealaneError, match=r"values\.json: line 3"):
        platform.policy()
