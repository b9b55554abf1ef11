"""What Intel says about its platforms: TCB info and enclave identity, as PCS answers or bundled for a verifier.

A signature covers the exact text of the inner object, so the text is kept as it came and parsed beside it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from sealane.attest.reading import JSON_BYTES_MAX, decode_text, parse_hex, parse_json
from sealane.crypto.chains import (
    Certificate,
    CertificateMalformed,
    RevocationList,
    parse_certificates,
    parse_revocation_list,
)
from sealane.errors import EvidenceError

TCB_LEVELS_MAX: Final = 512  # Intel publishes some thirty


@dataclass(frozen=True)
class SignedStatement:
    """The text of a `tcbInfo` or `enclaveIdentity` object and the 64 bytes r || s over it."""

    kind: str
    text: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    issuer_chain: tuple[Certificate, ...] = ()


@dataclass(frozen=True)
class TcbLevel:
    """One level: what a platform needs for it, and what it means."""

    sgx: tuple[int, ...]
    tdx: tuple[int, ...]
    pce_svn: int
    status: str
    advisories: tuple[str, ...]


@dataclass(frozen=True)
class IsvLevel:
    """One level of an enclave or a TDX module, by its security version."""

    svn: int
    status: str
    advisories: tuple[str, ...]


@dataclass(frozen=True)
class ModuleIdentity:
    """Which TDX module is genuine."""

    name: str
    mr_signer: bytes
    attributes: bytes
    mask: bytes
    levels: tuple[IsvLevel, ...]


@dataclass(frozen=True)
class TcbInfo:
    """TCB info, version 3."""

    tee: str
    version: int
    issued: datetime
    next_update: datetime
    fmspc: bytes
    pce_id: bytes
    levels: tuple[TcbLevel, ...]
    module: ModuleIdentity | None
    modules: tuple[ModuleIdentity, ...]


@dataclass(frozen=True)
class EnclaveIdentity:
    """Which quoting enclave is genuine."""

    name: str
    version: int
    issued: datetime
    next_update: datetime
    miscselect: int
    miscselect_mask: int
    attributes: bytes
    attributes_mask: bytes
    mr_signer: bytes
    prod_id: int
    levels: tuple[IsvLevel, ...]


@dataclass
class Collateral:
    """Everything that came beside the evidence. Nothing in it is trusted before it was verified."""

    certificates: list[Certificate] = field(default_factory=list)
    lists: list[RevocationList] = field(default_factory=list)
    statements: list[SignedStatement] = field(default_factory=list)

    def extend(self, other: "Collateral") -> None:
        """Add what another file brought."""
        self.certificates += other.certificates
        self.lists += other.lists
        self.statements += other.statements


def parse_json_collateral(data: bytes) -> Collateral | None:
    """A bundle or a PCS answer; None where the JSON is something else. Raises EvidenceError."""
    text = decode_text(data, "collateral")
    value = parse_json(text, "collateral")
    if not isinstance(value, dict):
        return None
    if "tcb_info" in value and "qe_identity" in value:
        return _bundle(value)
    for name in ("tcbInfo", "enclaveIdentity"):
        if name in value and "signature" in value:
            signature = parse_hex(value["signature"], "signature", 64)
            statement = SignedStatement(name, _exact_text(text, name), signature)
            return Collateral(statements=[statement])
    return None


def parse_tcb_info(statement: SignedStatement) -> TcbInfo:
    """The content of a `tcbInfo`; raises EvidenceError `attest.malformed`."""
    value = _object(parse_json(decode_text(statement.text, "tcbInfo"), "tcbInfo"), "tcbInfo")
    with _reading("tcbInfo"):
        levels = _list(value["tcbLevels"], "tcbLevels")
        module = value.get("tdxModule")
        modules = value.get("tdxModuleIdentities", [])
        return TcbInfo(
            tee=_text(value["id"]),
            version=_number(value["version"]),
            issued=_time(value["issueDate"]),
            next_update=_time(value["nextUpdate"]),
            fmspc=parse_hex(value["fmspc"], "fmspc", 6),
            pce_id=parse_hex(value["pceId"], "pceId", 2),
            levels=tuple(_tcb_level(_object(one, "tcbLevel")) for one in levels),
            module=None if module is None else _module(_object(module, "tdxModule")),
            modules=tuple(_module(_object(one, "tdxModule")) for one in _list(modules, "tdxModuleIdentities")),
        )


def parse_enclave_identity(statement: SignedStatement) -> EnclaveIdentity:
    """The content of an `enclaveIdentity`; raises EvidenceError `attest.malformed`."""
    what = "enclaveIdentity"
    value = _object(parse_json(decode_text(statement.text, what), what), what)
    with _reading(what):
        return EnclaveIdentity(
            name=_text(value["id"]),
            version=_number(value["version"]),
            issued=_time(value["issueDate"]),
            next_update=_time(value["nextUpdate"]),
            miscselect=int.from_bytes(parse_hex(value["miscselect"], "miscselect", 4), "little"),
            miscselect_mask=int.from_bytes(parse_hex(value["miscselectMask"], "miscselectMask", 4), "little"),
            attributes=parse_hex(value["attributes"], "attributes", 16),
            attributes_mask=parse_hex(value["attributesMask"], "attributesMask", 16),
            mr_signer=parse_hex(value["mrsigner"], "mrsigner", 32),
            prod_id=_number(value["isvprodid"]),
            levels=_isv_levels(value["tcbLevels"]),
        )


class _reading:
    """Turns what a missing or odd member raises into EvidenceError."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyError):
            raise EvidenceError("attest.malformed", f"{self.what}: {error} is missing") from error
        if isinstance(error, ValueError | TypeError | OverflowError):
            raise EvidenceError("attest.malformed", f"{self.what}: {error}") from error


def _bundle(value: Mapping[str, Any]) -> Collateral:
    found = Collateral()
    for name, kind in (("tcb_info", "tcbInfo"), ("qe_identity", "enclaveIdentity")):
        with _reading("collateral"):
            text = _text(value[name]).encode()
            signature = parse_hex(value[f"{name}_signature"], f"{name}_signature", 64)
            chain = _certificates(_text(value[f"{name}_issuer_chain"]).encode())
        found.statements.append(SignedStatement(kind, text, signature, chain))
        found.certificates += chain
    for name in ("root_ca_crl", "pck_crl"):
        if value.get(name) is not None:
            found.lists.append(_revocations(value[name], name))
    for name in ("pck_crl_issuer_chain", "pck_certificate_chain"):
        if value.get(name) is not None:
            with _reading("collateral"):
                found.certificates += _certificates(_text(value[name]).encode())
    return found


def _revocations(value: object, what: str) -> RevocationList:
    data = value.encode() if isinstance(value, str) and "-----BEGIN" in value else parse_hex(value, what)
    try:
        return parse_revocation_list(data)
    except CertificateMalformed as error:
        raise EvidenceError("attest.malformed", f"{what}: {error}") from error


def _certificates(data: bytes) -> tuple[Certificate, ...]:
    try:
        return parse_certificates(data)
    except CertificateMalformed as error:
        raise EvidenceError("attest.malformed", f"issuer chain: {error}") from error


def _exact_text(text: str, name: str) -> bytes:
    """The characters of the member `name` of the outer object, exactly as they stand there."""
    decoder = json.JSONDecoder()
    position = _skip_space(text, 0) + 1
    while position < min(len(text), JSON_BYTES_MAX):
        position = _skip_space(text, position)
        key, position = decoder.raw_decode(text, position)
        start = _skip_space(text, _skip_space(text, position) + 1)
        _, position = decoder.raw_decode(text, start)
        if key == name:
            return text[start:position].encode()
        position = _skip_space(text, position) + 1
    raise EvidenceError("attest.malformed", f"{name} is not a member")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _tcb_level(level: Mapping[str, Any]) -> TcbLevel:
    tcb = _object(level["tcb"], "tcb")
    return TcbLevel(
        sgx=_components(tcb["sgxtcbcomponents"]),
        tdx=_components(tcb["tdxtcbcomponents"]) if "tdxtcbcomponents" in tcb else (),
        pce_svn=_number(tcb["pcesvn"]),
        status=_text(level["tcbStatus"]),
        advisories=_advisories(level),
    )


def _components(value: object) -> tuple[int, ...]:
    components = tuple(_number(_object(one, "component")["svn"]) for one in _list(value, "components"))
    if len(components) != 16:
        raise ValueError(f"{len(components)} components, not 16")
    return components


def _isv_levels(value: object) -> tuple[IsvLevel, ...]:
    levels = [_object(one, "tcbLevel") for one in _list(value, "tcbLevels")]
    return tuple(
        IsvLevel(_number(_object(one["tcb"], "tcb")["isvsvn"]), _text(one["tcbStatus"]), _advisories(one))
        for one in levels
    )


def _module(value: Mapping[str, Any]) -> ModuleIdentity:
    return ModuleIdentity(
        name=_text(value.get("id", "")),
        mr_signer=parse_hex(value["mrsigner"], "mrsigner", 48),
        attributes=parse_hex(value["attributes"], "attributes", 8),
        mask=parse_hex(value["attributesMask"], "attributesMask", 8),
        levels=_isv_levels(value.get("tcbLevels", [])),
    )


def _advisories(level: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_text(one)[:64] for one in _list(level.get("advisoryIDs", []), "advisoryIDs"))


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise EvidenceError("attest.malformed", f"{what}: not an object")
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > TCB_LEVELS_MAX:
        raise EvidenceError("attest.malformed", f"{what}: not a list of at most {TCB_LEVELS_MAX}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 0xFFFF_FFFF:
        raise ValueError("not a small non-negative number")
    return value


def _time(value: object) -> datetime:
    time = datetime.fromisoformat(_text(value))
    if time.tzinfo is None:
        raise ValueError("a time without a zone")
    return time.astimezone(UTC)
