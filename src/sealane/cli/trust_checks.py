"""What `sealane doctor` looks at of attestation: what this host shows, and what it expects of peers."""

from collections.abc import Iterator
from typing import Final

from sealane.cli.findings import Context, Finding, configured
from sealane.host.quoting import expected_files, place_of_roots
from sealane.quoting.expected import check_files
from sealane.quoting.interface import DriverName
from sealane.quoting.roots import describe_roots

_SIMULATED_MEND: Final = "for production take a hardware TPM, SGX, TDX or SEV-SNP; peers accept this one by name only"
_ROOT_MENDS: Final[dict[DriverName, str]] = {
    "software": "run `sealane init`",
    "tpm2": "is `attestation.tcti` right, tpm2-tools installed, and the TPM open to this user?",
    "simulated": "name its directory in `attestation.simulated_root`",
    "sgx": 'run the agent under Gramine, with sgx.remote_attestation = "dcap"',
    "tdx": "mount configfs, in a trust domain with Linux 6.7 or later",
    "sev-snp": "mount configfs, in an SEV-SNP guest with Linux 6.7 or later",
}


def check_roots(context: Context) -> Iterator[Finding]:
    """What signs for this host: by the settings, and whether it answers; a simulation is named as one."""
    settings = configured(context).attestation
    for root in describe_roots(settings.drivers, place_of_roots(settings)):
        if root.problem:
            yield Finding("root of trust", "broken", root.sentence, _ROOT_MENDS[root.driver])
        elif root.worth == "simulated":
            yield Finding("root of trust", "warning", root.sentence, _SIMULATED_MEND)
        elif root.worth == "identity":
            yield Finding("root of trust", "ok", f"{root.sentence}: nothing proves what runs here")
        else:
            yield Finding("root of trust", "ok", root.sentence)


def check_expectations(context: Context) -> Iterator[Finding]:
    """Whether the files that say what peers have to be can be used: syntax, signature, and what they hold."""
    settings = configured(context).attestation
    for one in check_files(expected_files(settings), context.paths.state):
        name = one.setting.replace("_", " ")
        if one.problem is None:
            yield Finding(name, "ok", f"{one.path}: {one.words}")
        elif one.is_missing:
            mend = "put it there, or take it out of agent.toml; every peer is refused until then"
            yield Finding(name, "broken", f"{one.path} is not there", mend)
        else:
            yield Finding(name, "broken", one.problem.detail, one.problem.mend)
