"""The catalogue of reasons: what each one does to a verdict, and which clause it stands on.

A reason refuses, weakens or notes. A refusal brings the level to 0; a weakness is a bound that the level cannot exceed;
a note changes nothing. What could not be checked is a refusal or a weakness, never nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final


class Level(IntEnum):
    """Trust assurance levels."""

    NOTHING = 0
    IDENTITY = 1
    MEASURED_SOFTWARE = 2
    HARDWARE_ROOTED = 3
    ISOLATED = 4

    @property
    def words(self) -> str:
        """What the level says."""
        return _WORDS[self]


_WORDS: Final = {
    Level.NOTHING: "nothing is known",
    Level.IDENTITY: "identity",
    Level.MEASURED_SOFTWARE: "measured software",
    Level.HARDWARE_ROOTED: "hardware-rooted boot and runtime measurement",
    Level.ISOLATED: "isolated by a TEE",
}


class Severity(Enum):
    """What a reason does."""

    REFUSAL = "refusal"
    WEAKNESS = "weakness"
    NOTE = "note"


class Claim(Enum):
    """The claims of an AR4SI trustworthiness vector that are filled here."""

    INSTANCE_IDENTITY = "instance-identity"
    CONFIGURATION = "configuration"
    EXECUTABLES = "executables"
    HARDWARE = "hardware"
    RUNTIME_OPAQUE = "runtime-opaque"


# draft-ietf-rats-ar4si, 2.3: 0 says nothing, 2-31 affirms, 32-95 warns, 96-127 contraindicates; 99: cryptography failed.
NO_CLAIM: Final = 0
AFFIRMING: Final = 2
APPROVED_BOOT: Final = 3
WARNING: Final = 32
CONTRAINDICATED: Final = 96
UNRECOGNIZED: Final = 97
CRYPTO_FAILED: Final = 99


@dataclass(frozen=True)
class Rule:
    """One row of the catalogue. `bound` is the highest level with this weakness; `value` goes to `claim`."""

    severity: Severity
    clause: str
    claim: Claim | None = None
    value: int = NO_CLAIM
    bound: Level = Level.ISOLATED


_PKIX: Final = "RFC 5280, 6.1.3"
_CRL: Final = "RFC 5280, 6.3.3"
_QUOTE: Final = "Intel SGX/TDX ECDSA quote format, quote signature data"
_PCS: Final = "Intel PCS API v4"
_SNP: Final = "AMD 56860, ATTESTATION_REPORT"
_VCEK: Final = "AMD 57230, 3"
_TPM: Final = "TPM 2.0 Library, part 2, 10.12"
_PFP: Final = "TCG PC Client PFP, 10"
_IMA: Final = "Linux, security/integrity/ima"
_LOGS: Final = "Shi et al. 2017, measurement log; docs/attestation.md"
_RATS: Final = "RFC 9334, 8"
_FRESH: Final = "RFC 9334, 10"


def _refuse(clause: str, claim: Claim | None = None, value: int = CONTRAINDICATED) -> Rule:
    return Rule(Severity.REFUSAL, clause, claim, value, Level.NOTHING)


def _weaken(bound: Level, clause: str, claim: Claim | None = None, value: int = NO_CLAIM) -> Rule:
    return Rule(Severity.WEAKNESS, clause, claim, value, bound)


def _note(clause: str) -> Rule:
    return Rule(Severity.NOTE, clause)


REASONS: Final[Mapping[str, Rule]] = {
    # certificates and lists
    "chain.missing": _refuse(_PKIX, Claim.HARDWARE, UNRECOGNIZED),
    "chain.broken": _refuse(_PKIX, Claim.HARDWARE, CRYPTO_FAILED),
    "chain.root-unknown": _refuse("RFC 5280, 6.1.1 (d)", Claim.HARDWARE, UNRECOGNIZED),
    "chain.test-root": _refuse("RFC 5280, 6.1.1 (d)", Claim.HARDWARE, UNRECOGNIZED),
    "chain.test-root-accepted": _weaken(Level.ISOLATED, "RFC 5280, 6.1.1 (d)", Claim.HARDWARE, WARNING),
    "chain.expired": _refuse(f"{_PKIX} (a)(2)", Claim.HARDWARE),
    "chain.not-yet-valid": _refuse(f"{_PKIX} (a)(2)", Claim.HARDWARE),
    "chain.revoked": _refuse(f"{_PKIX} (a)(3)", Claim.HARDWARE),
    "crl.missing": _refuse(_CRL, Claim.HARDWARE),
    "crl.signature": _refuse(f"{_CRL} (g)", Claim.HARDWARE, CRYPTO_FAILED),
    "crl.expired": _refuse(f"{_CRL} (a)", Claim.HARDWARE),
    "crl.not-yet-valid": _refuse(f"{_CRL} (a)", Claim.HARDWARE),
    # signed statements of a vendor
    "collateral.missing": _refuse(_PCS, Claim.HARDWARE),
    "collateral.signature": _refuse(_PCS, Claim.HARDWARE, CRYPTO_FAILED),
    "collateral.expired": _refuse(f"{_PCS}, nextUpdate", Claim.HARDWARE),
    "collateral.not-yet-valid": _refuse(f"{_PCS}, issueDate", Claim.HARDWARE),
    "collateral.other-kind": _refuse(f"{_PCS}, id and version", Claim.HARDWARE),
    "collateral.other-platform": _refuse(f"{_PCS}, fmspc and pceId", Claim.HARDWARE),
    # SGX and TDX
    "dcap.qe-vendor": _refuse(f"{_QUOTE}, QE vendor id", Claim.HARDWARE, UNRECOGNIZED),
    "dcap.qe-signature": _refuse(_QUOTE, Claim.HARDWARE, CRYPTO_FAILED),
    "dcap.qe-binding": _refuse(f"{_QUOTE}, QE report data", Claim.HARDWARE, CRYPTO_FAILED),
    "dcap.quote-signature": _refuse(_QUOTE, Claim.INSTANCE_IDENTITY, CRYPTO_FAILED),
    "dcap.qe-identity": _refuse(f"{_PCS}, enclave identity", Claim.HARDWARE),
    "dcap.pck": _refuse("Intel SGX PCK certificate profile, 1.3.5", Claim.HARDWARE),
    "dcap.tcb-unknown": _refuse(f"{_PCS}, TCB levels", Claim.HARDWARE),
    "dcap.tcb-revoked": _refuse(f"{_PCS}, tcbStatus", Claim.HARDWARE),
    "dcap.tcb-out-of-date": _refuse(f"{_PCS}, tcbStatus", Claim.HARDWARE),
    "dcap.tcb-hardening": _weaken(Level.HARDWARE_ROOTED, f"{_PCS}, tcbStatus", Claim.HARDWARE, WARNING),
    "dcap.tcb-configuration": _weaken(Level.HARDWARE_ROOTED, f"{_PCS}, tcbStatus", Claim.CONFIGURATION, WARNING),
    "dcap.tcb-accepted": _note(f"{_PCS}, tcbStatus"),
    "dcap.advisories": _note(f"{_PCS}, advisoryIDs"),
    "dcap.tdx-module": _refuse(f"{_PCS}, tdxModuleIdentities", Claim.HARDWARE),
    "tee.debug": _refuse("Intel SDM 3D, ATTRIBUTES; TDX module, TUD; AMD 56860, policy", Claim.RUNTIME_OPAQUE),
    "tee.attributes": _refuse("Intel SDM 3D, ATTRIBUTES; TDX module, TD attributes", Claim.CONFIGURATION),
    "tdx.sept-ve": _weaken(Level.HARDWARE_ROOTED, "TDX module, SEPT_VE_DISABLE", Claim.CONFIGURATION, WARNING),
    "tdx.service-td": _weaken(Level.HARDWARE_ROOTED, "TDX 1.5, MRSERVICETD", Claim.RUNTIME_OPAQUE, WARNING),
    "tdx.log-mismatch": _refuse("TCG PC Client PFP, 10; TDX RTMR", Claim.EXECUTABLES),
    # SEV-SNP
    "snp.signing-key": _refuse(f"{_SNP}, SIGNING_KEY", Claim.HARDWARE, UNRECOGNIZED),
    "snp.signature": _refuse(f"{_SNP}, SIGNATURE", Claim.INSTANCE_IDENTITY, CRYPTO_FAILED),
    "snp.tcb-mismatch": _refuse(f"{_VCEK}, spl", Claim.HARDWARE),
    "snp.chip-mismatch": _refuse(f"{_VCEK}, hwID", Claim.INSTANCE_IDENTITY),
    "snp.chip-masked": _weaken(Level.MEASURED_SOFTWARE, f"{_SNP}, MASK_CHIP_KEY", Claim.INSTANCE_IDENTITY, WARNING),
    "snp.product": _refuse(f"{_VCEK}, productName", Claim.HARDWARE, UNRECOGNIZED),
    "snp.crl-missing": _weaken(Level.HARDWARE_ROOTED, _CRL, Claim.HARDWARE, WARNING),
    "snp.tcb-unjudged": _weaken(Level.HARDWARE_ROOTED, f"{_SNP}, REPORTED_TCB", Claim.HARDWARE, WARNING),
    "snp.tcb-out-of-date": _refuse(f"{_SNP}, REPORTED_TCB", Claim.HARDWARE),
    "snp.vmpl": _refuse(f"{_SNP}, VMPL", Claim.EXECUTABLES),
    "snp.migration-agent": _weaken(Level.HARDWARE_ROOTED, "AMD 56860, policy", Claim.RUNTIME_OPAQUE, WARNING),
    "snp.policy": _refuse("AMD 56860, policy", Claim.CONFIGURATION),
    # TPM
    "tpm.signature-missing": _refuse(_TPM, Claim.INSTANCE_IDENTITY),
    "tpm.key-missing": _refuse(_TPM, Claim.INSTANCE_IDENTITY),
    "tpm.signature": _refuse("TPM 2.0 Library, part 3, 18.4 (Quote)", Claim.INSTANCE_IDENTITY, CRYPTO_FAILED),
    "tpm.ak-unknown": _refuse("TPM 2.0 Library, part 1, 24 (credential)", Claim.INSTANCE_IDENTITY, UNRECOGNIZED),
    "tpm.ak-attributes": _refuse("TPM 2.0 Library, part 2, 8.3 (restricted, sign)", Claim.INSTANCE_IDENTITY),
    "tpm.test-root": _refuse("TPM 2.0 Library, part 1, 24", Claim.HARDWARE, UNRECOGNIZED),
    "tpm.test-root-accepted": _weaken(Level.ISOLATED, "TPM 2.0 Library, part 1, 24", Claim.HARDWARE, WARNING),
    "tpm.selection-empty": _refuse("TPM 2.0 Library, part 2, 10.6.2", Claim.EXECUTABLES),
    "tpm.weak-bank": _weaken(Level.IDENTITY, "NIST SP 800-131A, 9", Claim.EXECUTABLES, WARNING),
    "tpm.pcr-digest": _refuse(f"{_TPM}, pcrDigest", Claim.EXECUTABLES),
    "tpm.pcr-replay": _refuse(f"{_PFP}, replay", Claim.EXECUTABLES),
    "tpm.boot-log-missing": _weaken(Level.IDENTITY, _PFP, Claim.EXECUTABLES, NO_CLAIM),
    "tpm.boot-unquoted": _weaken(Level.IDENTITY, f"{_PFP}, PCR 0-7", Claim.EXECUTABLES, NO_CLAIM),
    "tpm.runtime-log-missing": _weaken(Level.MEASURED_SOFTWARE, _IMA, Claim.EXECUTABLES, APPROVED_BOOT),
    "tpm.clock-unsafe": _note(f"{_TPM}, clockInfo.safe"),
    "eventlog.unquoted": _weaken(Level.NOTHING, _PFP),
    "eventlog.data": _refuse(f"{_PFP}, event data", Claim.EXECUTABLES),
    "eventlog.secure-boot": _note(f"{_PFP}, EV_EFI_VARIABLE_DRIVER_CONFIG"),
    "eventlog.legacy": _weaken(Level.IDENTITY, "NIST SP 800-131A, 9", Claim.EXECUTABLES, WARNING),
    "ima.unquoted": _weaken(Level.NOTHING, _IMA),
    "ima.template": _refuse(f"{_IMA}, template digest", Claim.EXECUTABLES),
    "ima.violation": _weaken(Level.MEASURED_SOFTWARE, f"{_IMA}, violations", Claim.EXECUTABLES, WARNING),
    "ima.boot-aggregate": _refuse(f"{_IMA}, boot_aggregate", Claim.EXECUTABLES),
    "ima.unproved-tail": _note(f"{_IMA}, the list grows"),
    "ima.weak-digest": _weaken(Level.MEASURED_SOFTWARE, "NIST SP 800-131A, 9", Claim.EXECUTABLES, WARNING),
    # Sealane's own log, and hosts without a root of trust
    "platform.log-missing": _weaken(Level.MEASURED_SOFTWARE, _LOGS, Claim.EXECUTABLES, NO_CLAIM),
    "platform.unquoted": _weaken(Level.NOTHING, _LOGS),
    "platform.replay": _refuse(_LOGS, Claim.EXECUTABLES),
    "platform.entry": _refuse(_LOGS, Claim.EXECUTABLES),
    "software.plain-key": _weaken(Level.IDENTITY, "RFC 9334, 12.1 (attester's key)", Claim.HARDWARE, NO_CLAIM),
    "software.signature": _refuse("RFC 8032, 5.1.7", Claim.INSTANCE_IDENTITY, CRYPTO_FAILED),
    "software.key-unknown": _refuse("RFC 9334, 12.1 (attester's key)", Claim.INSTANCE_IDENTITY, UNRECOGNIZED),
    # what is expected
    "reference.none": _weaken(Level.IDENTITY, _RATS, Claim.EXECUTABLES, NO_CLAIM),
    "reference.runtime-none": _weaken(Level.MEASURED_SOFTWARE, _RATS, Claim.EXECUTABLES, APPROVED_BOOT),
    "reference.mismatch": _refuse(_RATS, Claim.EXECUTABLES),
    "reference.enclave": _refuse(_RATS, Claim.EXECUTABLES),
    "reference.qemu": _refuse(_RATS, Claim.EXECUTABLES),
    "reference.platform-none": _weaken(Level.MEASURED_SOFTWARE, _RATS, Claim.EXECUTABLES, APPROVED_BOOT),
    "reference.host-unnamed": _weaken(Level.MEASURED_SOFTWARE, _RATS, Claim.INSTANCE_IDENTITY, NO_CLAIM),
    "reference.host": _refuse(_RATS, Claim.INSTANCE_IDENTITY, UNRECOGNIZED),
    "binding.empty": _refuse(_FRESH, Claim.INSTANCE_IDENTITY),
    "binding.mismatch": _refuse(_FRESH, Claim.INSTANCE_IDENTITY),
    "binding.unchecked": _weaken(Level.MEASURED_SOFTWARE, _FRESH),
    "evidence.none": _refuse(_RATS),
    "evidence.twice": _refuse(_RATS),
}

TEST_ROOT_CODES: Final = frozenset(
    {"chain.test-root", "chain.test-root-accepted", "tpm.test-root", "tpm.test-root-accepted"}
)
