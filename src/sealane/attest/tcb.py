"""Which TCB level a platform has, and what that means (Intel PCS API v4, "Get TCB Info" and "Get Enclave Identity")."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from sealane.attest.collateral import EnclaveIdentity, IsvLevel, ModuleIdentity, TcbInfo, TcbLevel
from sealane.attest.pck import PckPlatform
from sealane.attest.quotes import EnclaveReport, TdReport
from sealane.attest.reasons import Claim
from sealane.attest.reference import Reference
from sealane.attest.verdict import Findings

UP_TO_DATE: Final = "UpToDate"
HARDENING: Final = "SWHardeningNeeded"
CONFIGURATION: Final = "ConfigurationNeeded"
CONFIGURATION_AND_HARDENING: Final = "ConfigurationAndSWHardeningNeeded"
OUT_OF_DATE: Final = "OutOfDate"
OUT_OF_DATE_CONFIGURATION: Final = "OutOfDateConfigurationNeeded"
REVOKED: Final = "Revoked"
_KNOWN: Final = (
    UP_TO_DATE,
    HARDENING,
    CONFIGURATION,
    CONFIGURATION_AND_HARDENING,
    OUT_OF_DATE,
    OUT_OF_DATE_CONFIGURATION,
    REVOKED,
)
_NEEDS_CONFIGURATION: Final = {CONFIGURATION, CONFIGURATION_AND_HARDENING, OUT_OF_DATE_CONFIGURATION}


@dataclass(frozen=True)
class TcbStatus:
    """A status and the advisories that go with it."""

    status: str
    advisories: tuple[str, ...] = ()

    def merged(self, part: "TcbStatus") -> "TcbStatus":
        """With the status of a part (quoting enclave, TDX module) as Intel's verification library converges them."""
        advisories = tuple(dict.fromkeys((*self.advisories, *part.advisories)))
        both = {self.status, part.status}
        if not both <= set(_KNOWN):
            return TcbStatus(next(one for one in (self.status, part.status) if one not in _KNOWN), advisories)
        if REVOKED in both:
            return TcbStatus(REVOKED, advisories)
        if both & {OUT_OF_DATE, OUT_OF_DATE_CONFIGURATION}:
            status = OUT_OF_DATE_CONFIGURATION if both & _NEEDS_CONFIGURATION else OUT_OF_DATE
            return TcbStatus(status, advisories)
        configuration, hardening = both & _NEEDS_CONFIGURATION, both & {HARDENING, CONFIGURATION_AND_HARDENING}
        if configuration and hardening:
            return TcbStatus(CONFIGURATION_AND_HARDENING, advisories)
        return TcbStatus(CONFIGURATION if configuration else HARDENING if hardening else UP_TO_DATE, advisories)


def platform_status(
    info: TcbInfo, platform: PckPlatform, body: EnclaveReport | TdReport, findings: Findings
) -> TcbStatus | None:
    """The status of platform and TDX module together; None (and a reason) where no level fits."""
    level = next((one for one in info.levels if _reaches(platform, body, one)), None)
    if level is None:
        findings.add("dcap.tcb-unknown", "the platform's security versions are below every TCB level that Intel lists")
        return None
    status = TcbStatus(level.status, level.advisories)
    if isinstance(body, TdReport):
        module = _module_status(info, body, findings)
        return None if module is None else status.merged(module)
    return status


def enclave_status(report: EnclaveReport, identity: EnclaveIdentity, findings: Findings) -> TcbStatus | None:
    """The quoting enclave against its identity; None (and a reason) where it is another enclave."""
    wrong = []
    if report.mrsigner != identity.mr_signer:
        wrong.append("MRSIGNER")
    if report.prod_id != identity.prod_id:
        wrong.append("ISVPRODID")
    if report.miscselect & identity.miscselect_mask != identity.miscselect & identity.miscselect_mask:
        wrong.append("MISCSELECT")
    if _masked(report.attributes, identity.attributes_mask) != _masked(identity.attributes, identity.attributes_mask):
        wrong.append("ATTRIBUTES")
    if wrong:
        findings.add("dcap.qe-identity", f"the quoting enclave is not Intel's: {', '.join(wrong)} differ")
        return None
    found = _isv_level(report.svn, identity.levels)
    if found is None:
        findings.add("dcap.tcb-unknown", f"the quoting enclave's ISVSVN {report.svn} is below every level")
    return found


def judge_status(status: TcbStatus, reference: Reference, findings: Findings) -> None:
    """What the merged status does to the verdict."""
    findings.facts["tcb_status"] = status.status
    findings.facts["advisories"] = list(status.advisories)
    advisories = f" ({', '.join(status.advisories)})" if status.advisories else ""
    if status.status == UP_TO_DATE:
        findings.affirm(Claim.HARDWARE)
        if status.advisories:
            findings.add("dcap.advisories", f"advisories apply although the TCB is up to date{advisories}")
    elif status.status == REVOKED:
        findings.add("dcap.tcb-revoked", f"Intel has revoked this TCB level{advisories}")
    elif status.status in {OUT_OF_DATE, OUT_OF_DATE_CONFIGURATION}:
        findings.add("dcap.tcb-out-of-date", f"the TCB is {status.status}{advisories}")
    elif status.status not in _KNOWN:
        findings.add("dcap.tcb-unknown", f"a TCB status that is not known: {status.status[:40]!r}")
    elif status.status in reference.accept_tcb_statuses:
        findings.affirm(Claim.HARDWARE)
        findings.add("dcap.tcb-accepted", f"the TCB is {status.status}, which the reference file accepts{advisories}")
    else:
        if status.status in {HARDENING, CONFIGURATION_AND_HARDENING}:
            findings.add("dcap.tcb-hardening", f"the TCB needs hardening in software{advisories}")
        if status.status in _NEEDS_CONFIGURATION:
            findings.add("dcap.tcb-configuration", f"the platform needs another configuration{advisories}")


def _reaches(platform: PckPlatform, body: EnclaveReport | TdReport, level: TcbLevel) -> bool:
    if platform.pce_svn < level.pce_svn or not _at_least(platform.components, level.sgx):
        return False
    if not isinstance(body, TdReport):
        return True
    # With a module version (index 1) the module's own identity judges indexes 0 and 1.
    first = 2 if body.tee_tcb_svn[1] else 0
    return len(level.tdx) == 16 and _at_least(body.tee_tcb_svn[first:], level.tdx[first:])


def _at_least(have: Iterable[int], want: Iterable[int]) -> bool:
    return all(one >= other for one, other in zip(have, want, strict=True))


def _module_status(info: TcbInfo, body: TdReport, findings: Findings) -> TcbStatus | None:
    svn, version = body.tee_tcb_svn[0], body.tee_tcb_svn[1]
    module: ModuleIdentity | None = info.module
    if version:
        name = f"TDX_{version:02X}"
        module = next((one for one in info.modules if one.name.upper() == name), None)
    if module is None:
        findings.add("dcap.tdx-module", f"the TCB info does not know TDX modules of the version {version}")
        return None
    outside = bytes(one & ~mask & 0xFF for one, mask in zip(body.seam_attributes, module.mask, strict=True))
    if (
        body.mr_signer_seam != module.mr_signer
        or _masked(body.seam_attributes, module.mask) != _masked(module.attributes, module.mask)
        or any(outside)
    ):
        findings.add("dcap.tdx-module", "the TDX module is not one that Intel signed, or has other attributes")
        return None
    if not version:
        return TcbStatus(UP_TO_DATE)
    found = _isv_level(svn, module.levels)
    if found is None:
        findings.add("dcap.tcb-unknown", f"the TDX module's SVN {svn} is below every level")
    return found


def _isv_level(svn: int, levels: Sequence[IsvLevel]) -> TcbStatus | None:
    return next((TcbStatus(one.status, one.advisories) for one in levels if svn >= one.svn), None)


def _masked(value: bytes, mask: bytes) -> bytes:
    return bytes(one & other for one, other in zip(value, mask, strict=True))
