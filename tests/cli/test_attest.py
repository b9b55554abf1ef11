"""`sealane attest verify`: files in, a verdict out, and the three exit statuses."""

import base64
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sealane.attest.appraise import FILES_MAX
from sealane.attest.reading import EVIDENCE_BYTES_MAX
from sealane.attest.reference import PAYLOAD_TYPE
from sealane.crypto.dsse import pre_authentication_encoding
from tests.attest.dcap_rig import DcapRig
from tests.attest.test_snp import SnpRig
from tests.attest.tpm_rig import TpmRig
from tests.cli.conftest import Run

AT = "2026-06-01T12:00:00Z"


def written(directory: Path, files: dict[str, bytes]) -> list[str]:
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return [str(directory / name) for name in files]


def reference_of(rig: DcapRig | TpmRig, directory: Path, **changes: Any) -> str:
    path = directory / "reference.json"
    path.write_text(rig.reference(**changes).model_dump_json(exclude_none=True))
    return str(path)


def signed(path: str, key: Ed25519PrivateKey, kind: str = PAYLOAD_TYPE) -> None:
    payload = Path(path).read_bytes()
    signature = key.sign(pre_authentication_encoding(kind, payload))
    envelope = {
        "payloadType": kind,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": "", "sig": base64.b64encode(signature).decode()}],
    }
    Path(path).write_text(json.dumps(envelope))


def public_key(key: Ed25519PrivateKey, directory: Path) -> str:
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path = directory / "key.pem"
    path.write_bytes(key.public_key().public_bytes(*form))
    return str(path)


def test_accepted_exits_with_0(run: Run, tmp_path: Path) -> None:
    rig = DcapRig()
    quote, *collateral = written(tmp_path, rig.files())
    options = [word for path in collateral for word in ("--collateral", path)]
    result = run("attest", "verify", quote, *options, "--reference", reference_of(rig, tmp_path), "--at", AT, "-v")
    assert result.exit_code == 0, result.output
    assert "✓ accepted as of 2026-06-01 12:00 UTC, level 4: isolated by a TEE; nothing of it on a vendor's root" in (
        result.output
    )
    assert "quote: SGX or TDX quote" in result.output


def test_refused_exits_with_1_and_tells_every_reason(run: Run, tmp_path: Path) -> None:
    rig = DcapRig(td_attributes=1, revoke_pck=True)
    files = written(tmp_path, rig.files())
    result = run("attest", "verify", *files, "--reference", reference_of(rig, tmp_path), "--at", AT)
    assert result.exit_code == 1
    for text in ("✗ tee.debug", "✗ chain.revoked", "! tdx.sept-ve", "✗ refused as of"):
        assert text in result.output
    quiet = run("attest", "verify", *files, "--reference", reference_of(rig, tmp_path), "--at", AT, "-q")
    assert "tee.debug" in quiet.stderr
    assert quiet.stdout == ""


def test_json_is_one_object(run: Run, tmp_path: Path) -> None:
    rig = TpmRig()
    files = written(tmp_path, rig.files())
    reference = reference_of(rig, tmp_path)
    result = run("attest", "verify", *files, "--reference", reference, "--at", AT, "--json")
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    value = json.loads(line)
    assert (value["type"], value["accepted"], value["level"], value["production_level"]) == ("verdict", True, 3, 0)
    assert value["why_not"] == []
    assert value["evidence"][0]["root"] == "TPM host-a (software)"
    reason = value["reasons"][0]
    assert set(reason) == {"code", "severity", "about", "sentence", "clause"}
    assert {one["kind"] for one in value["files"]} >= {"TPM quote", "event log", "IMA log"}


def test_a_level_not_reached_exits_with_1(run: Run, tmp_path: Path) -> None:
    rig = TpmRig()
    files = written(tmp_path, rig.files())
    result = run("attest", "verify", *files, "--reference", reference_of(rig, tmp_path, minimum_level=4), "--at", AT)
    assert result.exit_code == 1
    assert "level 3 is reached and 4 is wanted" in result.output


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"hello", "attest.unknown-kind"), (b"", "attest.unknown-kind"), (b'{"a": 1}', "attest.unknown-kind"),
     (b"\x03\0\x02\0" + bytes(100), "attest.malformed"), (b"\x30\x82ab", "attest.malformed")],
)  # fmt: skip
def test_not_understood_exits_with_2(run: Run, tmp_path: Path, content: bytes, code: str) -> None:
    (path,) = written(tmp_path, {"file": content})
    result = run("attest", "verify", path, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["code"] == code


def test_whatever_a_file_is_the_answer_is_one_of_three(run: Run, tmp_path: Path) -> None:
    """A directory, a file that is missing, empty, too large, named in no UTF-8: 2, told in a sentence."""
    quote = TpmRig().quote()
    huge, odd = tmp_path / "huge", tmp_path / os.fsdecode(b"\xff\xfe")
    with huge.open("wb") as file:
        file.truncate(EVIDENCE_BYTES_MAX + 1)
    odd.write_bytes(quote)
    (good,) = written(tmp_path, {"quote": quote})
    many = [good] * (FILES_MAX + 1)
    for files in (
        [str(tmp_path)],
        ["/proc/self/mem"],
        [str(huge)],
        many,
        [str(tmp_path / "none")],
        [good, str(tmp_path)],
    ):
        for form in ([], ["--json"], ["-q"]):
            result = run("attest", "verify", *files, *form)
            assert result.exit_code == 2, (files, result.output)
            assert "internal.error" not in result.output
    for form in ([], ["--json"], ["-v"]):
        assert run("attest", "verify", str(odd), *form).exit_code == 1
        assert run("attest", "verify", str(odd), "--reference", str(odd), *form).exit_code == 2


@pytest.mark.parametrize(
    "moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "9" * 5000, "-1", "²", "nan"]
)
def test_times_that_no_clock_shows(run: Run, tmp_path: Path, moment: str) -> None:
    (path,) = written(tmp_path, {"quote": TpmRig().quote()})
    result = run("attest", "verify", path, "--at", moment, "--json")
    assert (result.exit_code, json.loads(result.stdout)["code"]) == (2, "usage.argument")


def test_files_cut_changed_and_thrown_together_never_crash_it(run: Run, tmp_path: Path) -> None:
    """Every kind, mutated and in any company, among the evidence, the collateral and the reference values."""
    chance = random.Random(9)
    sets = [DcapRig(version=3).files(), DcapRig(version=5).files(), SnpRig().files(), TpmRig(leave_out=()).files()]
    whole = [data for files in sets for data in files.values()]
    seen = set()
    for number in range(150):
        files = dict(chance.choice(sets))
        for name in chance.sample(sorted(files), chance.randint(0, 2)):
            files[name] = mutated(files[name], chance)
        for extra in range(chance.randint(0, 2)):
            files[f"extra{extra}"] = chance.choice(whole)
        paths = written(tmp_path, files)
        chance.shuffle(paths)
        words = [*paths[:-1], "--collateral", paths[-1]] if len(paths) > 1 else paths
        if number % 10 == 0:
            words += ["--reference", chance.choice(paths)]
        result = run("attest", "verify", *words, "--at", AT, *chance.choice(([], ["--json"], ["-v"], ["-q"])))
        seen.add(result.exit_code)
        assert result.exit_code in {0, 1, 2}, (number, result.output, result.exception)
        assert "internal.error" not in result.output, (number, result.output)
        for path in paths:
            Path(path).unlink()
    assert seen >= {1, 2}


def mutated(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return chance.choice(
        [
            data[:at],
            data[at:],
            data + data,
            data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :],
            data[:at] + chance.randbytes(8) + data[at + 8 :],
            data[:at] + b"\xff" * 4 + data[at + 4 :],
        ]
    )


def test_misuse_exits_with_2(run: Run, tmp_path: Path) -> None:
    (path,) = written(tmp_path, {"file": b"x"})
    for arguments in ([path, "--at", "yesterday"], [path, "--reference-key", path], [str(tmp_path / "none")], []):
        assert run("attest", "verify", *arguments).exit_code == 2


@pytest.mark.parametrize(
    "text", ["1780315200", "2026-06-01T12:00:00+00:00", "2026-06-01T14:00:00+02:00", "2026-06-01 12:00"]
)
def test_times(run: Run, tmp_path: Path, text: str) -> None:
    rig = DcapRig()
    files = written(tmp_path, rig.files())
    result = run("attest", "verify", *files, "--reference", reference_of(rig, tmp_path), "--at", text)
    assert "as of 2026-06-01 12:00 UTC" in result.output


def test_signed_reference_values(run: Run, tmp_path: Path) -> None:
    rig, key = TpmRig(), Ed25519PrivateKey.generate()
    files = written(tmp_path, rig.files())
    reference, key_file = reference_of(rig, tmp_path), public_key(key, tmp_path)
    unsigned = run("attest", "verify", *files, "--reference", reference, "--reference-key", key_file)
    assert unsigned.exit_code == 2
    signed(reference, key)
    good = run("attest", "verify", *files, "--reference", reference, "--reference-key", key_file, "--at", AT)
    assert good.exit_code == 0
    without_key = run("attest", "verify", *files, "--reference", reference)
    assert without_key.exit_code == 2
    for spoil in ("key", "type", "payload"):
        reference = reference_of(rig, tmp_path)
        signed(
            reference,
            Ed25519PrivateKey.generate() if spoil == "key" else key,
            "other" if spoil == "type" else PAYLOAD_TYPE,
        )
        if spoil == "payload":
            value = json.loads(Path(reference).read_text())
            value["payload"] = base64.b64encode(base64.b64decode(value["payload"]) + b" ").decode()
            Path(reference).write_text(json.dumps(value))
        result = run("attest", "verify", *files, "--reference", reference, "--reference-key", key_file, "--json")
        assert result.exit_code == 2
        assert json.loads(result.stdout)["code"] == "attest.reference-signature"


@pytest.mark.parametrize(
    "text",
    ["", "version = 2", "version = 1\nnonsense = 1", "version = 1\nminimum_level = 5", 'version = 1\nuser_data = "xy"',
     "{", '{"version": 1, "version": 1}', "version = 1\n[snp]\nmeasurement = []", "\x80"],
)  # fmt: skip
def test_a_reference_file_that_does_not_fit_is_not_half_used(run: Run, tmp_path: Path, text: str) -> None:
    (path, reference) = written(tmp_path, {"file": TpmRig().quote(), "reference": text.encode("latin-1")})
    result = run("attest", "verify", path, "--reference", reference, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["code"] == "attest.reference"


def test_toml(run: Run, tmp_path: Path) -> None:
    rig = DcapRig(version=3)
    text = (
        f'version = 1\nminimum_level = 4\naccept_test_roots = true\ntest_roots = ["{rig.root.digest}"]\n'
        f'user_data = "{bytes(range(1, 65)).hex()}"\nhosts = ["ppid:{bytes(range(16)).hex()}"]\n'
        f'[sgx]\nmrenclave = ["{"0A" * 32}"]\n'
    )
    files = written(tmp_path, rig.files())
    (reference,) = written(tmp_path, {"reference.toml": text.encode()})
    assert run("attest", "verify", *files, "--reference", reference, "--at", AT).exit_code == 0
