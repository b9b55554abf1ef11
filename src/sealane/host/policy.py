"""Whether a VM may move: Cedar policies of the configuration directory, asked at both ends before anything moves.

    CONFIG/policy/*.cedar         policies, read in the order of their names
    CONFIG/policy/entities.json   who belongs to which group (Cedar's entity format; attributes come from the agent)

Without any of these files the default below holds. `ALWAYS` holds with every policy. The files are read for each decision,
so an edit counts at once; files that cannot be read, parsed or validated allow nothing (`policy.broken`). Any error while
a policy is evaluated denies too: Cedar itself would skip that policy, and with it perhaps a `forbid`.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import cedarpy

from sealane.errors import make_error
from sealane.host.models import PeerTrust, PolicyDecision, VmDefinition

DIRECTORY: Final = "policy"
ENTITIES_FILE: Final = "entities.json"
# A hundred policies have some 50 KiB; a fleet's entities some hundred bytes a host.
FILE_BYTES_MAX: Final = 1 << 20
FILES_MAX: Final = 64

SCHEMA: Final = """\
entity Group;
entity User in [Group] = { "uid": Long };
entity HostGroup in [HostGroup];
entity Host in [HostGroup] = {
  "fingerprint": String,       // of the pinned certificate
  "level": Long,               // the trust level that this host's appraisal gave it
  "productionLevel": Long,     // the same without test roots
  "root": String,              // what the level rests on
  "identities": Set<String>    // hardware identities of its evidence: "ak:...", "ek:...", "ppid:...", "chip:..."
};
entity Label;
entity VmGroup in [VmGroup];
entity Vm in [VmGroup, Label] = { "leastLevel": Long };
type Movement = {
  "peer": Host,
  "protection": String,
  "allowedHere": Set<String>   // the setting allowed_protections of this host
};
action send appliesTo { principal: [User], resource: [Vm], context: Movement };
action receive appliesTo { principal: [Host], resource: [Vm], context: Movement };
"""

LEVEL_POLICY: Final = "sealane: no host below the level that the VM asks for"
ALWAYS: Final = f"""\
@id("{LEVEL_POLICY}")
forbid (principal, action, resource)
when {{ context.peer.level < resource.leastLevel }};
"""

DEFAULT: Final = """\
@id("default: any VM, between hosts that trust each other, sealed unless the settings allow otherwise")
permit (principal, action in [Action::"send", Action::"receive"], resource)
when {
  context.allowedHere.contains(context.protection) &&
  context.peer.productionLevel >= 1 &&
  context.peer.productionLevel >= resource.leastLevel
};
"""

# Only what belongs to something stands in the file; what things are, the agent says.
_FACTUAL: Final = frozenset({"User", "Host", "Vm"})
_GROUPS: Final = frozenset({"Group", "HostGroup", "VmGroup", "Label"})
_LEVELS: Final = range(1, 5)


@dataclass(frozen=True)
class Caller:
    """Who asks, by the peer credentials of the agent's socket (unix(7), SO_PEERCRED) and the user database."""

    name: str
    uid: int
    groups: tuple[str, ...] = ()


UNKNOWN_CALLER: Final = Caller("unknown", -1)


@dataclass(frozen=True)
class Move:
    """One question. `direction` is this host's: it sends the VM to the peer, or receives it from there."""

    direction: Literal["send", "receive"]
    vm: VmDefinition
    peer: str
    fingerprint: str
    trust: PeerTrust
    protection: str
    caller: Caller = UNKNOWN_CALLER
    allowed_here: tuple[str, ...] = ("sealed",)


@dataclass(frozen=True)
class Named:
    """A policy: what it is called, where it stands, whether it permits."""

    name: str
    file: str
    effect: str


@dataclass(frozen=True)
class Policy:
    """A policy that was read and validated. `digest` is over names and contents of all files, and over `ALWAYS`."""

    source: Literal["default", "files"]
    texts: tuple[tuple[str, str], ...]
    entities: tuple[dict[str, Any], ...]
    digest: str
    named: tuple[Named, ...] = ()
    _parsed: Any = field(default=None, repr=False, compare=False)

    def decide(self, move: Move) -> PolicyDecision:
        """What the policy says, and why, in words."""
        allowed, names, errors = self._ask(move)
        code = None
        if errors:
            words, code = f"a policy could not be evaluated: {errors[0]}", "policy.broken"
        elif allowed:
            words = f"allowed by {_quoted(names)}"
        elif LEVEL_POLICY in names:
            reached, wanted = move.trust.level, move.vm.least_level
            words = f"{move.peer} reached level {reached} and {move.vm.name} asks for {wanted}"
            code = "policy.level-too-low"
        elif names:
            words, code = f"forbidden by {_quoted(names)}", "policy.denied"
        else:
            hint = self._would_need(move)
            words, code = f"no policy allows it{f'; {hint}' if hint else ''}", "policy.denied"
        return PolicyDecision(
            decision="allow" if allowed and not errors else "deny",
            digest=self.digest,
            source=self.source,
            policies=names,
            words=words,
            code=code,
        )

    def _ask(self, move: Move) -> tuple[bool, list[str], list[str]]:
        result = cedarpy.is_authorized(_request(move), self._parsed, _entities(move, self.entities), schema=SCHEMA)
        names = [self.named[int(each.removeprefix("policy"))].name for each in result.diagnostics.reasons]
        return result.allowed, sorted(names), list(result.diagnostics.errors)

    def _would_need(self, move: Move) -> str:
        """What else the move would have to be, to be allowed; empty where nothing that is tried helps."""
        if move.protection != "sealed" and self._ask(replace(move, protection="sealed"))[0]:
            return "it would be allowed with the protection sealed"
        for level in _LEVELS:
            better = move.trust.model_copy(update={"level": level, "production_level": level})
            if level > move.trust.production_level and self._ask(replace(move, trust=better))[0]:
                return f"it would be allowed to a host of level {level}"
        return ""


def load_policy(config: Path) -> Policy:
    """The policy of a configuration directory; raises `policy.broken` naming the file and what is wrong with it."""
    files = _read(config / DIRECTORY)
    policies = tuple((name, text) for name, text in files if name != ENTITIES_FILE)
    entities = tuple(each for name, text in files if name == ENTITIES_FILE for each in _parse_entities(text))
    if not files:
        return _compile("default", (("default", DEFAULT),), ())
    return _compile("files", policies, entities, files)


def _read(directory: Path) -> list[tuple[str, str]]:
    try:
        paths = sorted(p for p in directory.iterdir() if p.suffix == ".cedar" or p.name == ENTITIES_FILE)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise make_error("policy.broken", f"{directory}: {error.strerror}") from error
    if len(paths) > FILES_MAX:
        raise make_error("policy.broken", f"{directory} has more than {FILES_MAX} files")
    return [(path.name, _read_file(path)) for path in paths]


def _read_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise make_error("policy.broken", f"{path}: {reason}") from error
    if len(data) > FILE_BYTES_MAX:
        raise make_error("policy.broken", f"{path} is larger than {FILE_BYTES_MAX} bytes")
    return text


def _compile(
    source: Literal["default", "files"],
    texts: tuple[tuple[str, str], ...],
    entities: tuple[dict[str, Any], ...],
    files: Sequence[tuple[str, str]] = (),
) -> Policy:
    every = (("always", ALWAYS), *texts)
    named = tuple(each for name, text in every for each in _named(name, text))
    whole = "\n".join(text for _, text in every)
    try:
        parsed = cedarpy.PolicySet.from_str(whole)
        cedarpy.Entities.from_json_str(json.dumps([_with_facts(each) for each in entities]), SCHEMA)
    except ValueError as error:
        raise make_error("policy.broken", f"the files do not fit together: {_short(error)}") from None
    digest = hashlib.sha256()
    for name, text in (("always", ALWAYS), *(files or texts)):
        for part in (name.encode(), text.encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return Policy(source, texts, entities, digest.hexdigest(), named, parsed)


def _named(file: str, text: str) -> Iterator[Named]:
    """The policies of one file, parsed and validated against the schema by themselves, so that errors name the file."""
    try:
        value = json.loads(cedarpy.policies_to_json_str(text)) if text.strip() else {"staticPolicies": {}}
    except ValueError as error:
        raise make_error("policy.broken", f"{file}: {_short(error)}") from None
    if value.get("templates"):
        raise make_error("policy.broken", f"{file}: policy templates (?principal, ?resource) have nothing to fill them")
    result = cedarpy.validate_policies(text, SCHEMA)
    if not result.validation_passed:
        raise make_error("policy.broken", f"{file}: {_short(result.errors[0] if result.errors else 'not valid')}")
    static = value["staticPolicies"]
    for index in range(len(static)):
        policy = static[f"policy{index}"]
        name = policy.get("annotations", {}).get("id") or f"{file}, policy {index + 1}"
        if name == LEVEL_POLICY and file != "always":
            raise make_error("policy.broken", f"{file}: {name!r} is the name of a policy that is always there")
        yield Named(name, file, policy["effect"])


def _parse_entities(text: str) -> Iterator[dict[str, Any]]:
    """Membership only: a uid and its parents. What a host, a VM or a user is may not be written down here."""
    try:
        value = json.loads(text)
        for each in value:
            kind, name = each["uid"]["type"], each["uid"]["id"]
            parents = [{"type": _group(parent["type"]), "id": str(parent["id"])} for parent in each.get("parents", [])]
            if kind not in _FACTUAL | _GROUPS or each.get("attrs") or each.keys() - {"uid", "attrs", "parents"}:
                raise ValueError(f"{kind}::{name} may have parents and nothing else")
            yield {"uid": {"type": str(kind), "id": str(name)}, "attrs": {}, "parents": parents}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = _short(error) if isinstance(error, ValueError) else "not a list of Cedar entities"
        raise make_error("policy.broken", f"{ENTITIES_FILE}: {why}") from None


def _with_facts(entity: dict[str, Any]) -> dict[str, Any]:
    """The entity with attributes of the right types, so that the schema can judge what it belongs to."""
    host = {"fingerprint": "", "level": 0, "productionLevel": 0, "root": "", "identities": []}
    facts: dict[str, dict[str, Any]] = {"User": {"uid": 0}, "Host": host, "Vm": {"leastLevel": 0}}
    return {**entity, "attrs": facts.get(entity["uid"]["type"], {})}


def _group(kind: object) -> str:
    if kind not in _GROUPS:
        raise ValueError(f"{kind} is no kind of group")
    return str(kind)


def _request(move: Move) -> dict[str, Any]:
    principal = ("User", move.caller.name) if move.direction == "send" else ("Host", move.peer)
    return {
        "principal": _uid(*principal),
        "action": _uid("Action", move.direction),
        "resource": _uid("Vm", move.vm.name),
        "context": {
            "peer": {"__entity": _uid("Host", move.peer)},
            "protection": move.protection,
            "allowedHere": list(move.allowed_here),
        },
    }


def _entities(move: Move, written: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the agent knows of the three that the question is about, with what the file says they belong to."""
    trust = move.trust
    facts: dict[tuple[str, str], tuple[dict[str, Any], list[dict[str, str]]]] = {
        ("User", move.caller.name): ({"uid": move.caller.uid}, [_uid("Group", each) for each in move.caller.groups]),
        ("Host", move.peer): (
            {
                "fingerprint": move.fingerprint,
                "level": trust.level,
                "productionLevel": trust.production_level,
                "root": trust.root,
                "identities": trust.identities,
            },
            [],
        ),
        ("Vm", move.vm.name): (
            {"leastLevel": move.vm.least_level},
            [_uid("Label", f"{key}={value}") for key, value in move.vm.labels.items()],
        ),
    }
    # of users, hosts and VMs only the three in question are told: the others' attributes are not known here
    found = [each for each in written if each["uid"]["type"] in _GROUPS]
    for (kind, name), (attributes, parents) in facts.items():
        for each in written:
            if each["uid"] == _uid(kind, name):
                parents += [parent for parent in each["parents"] if parent not in parents]
        found.append({"uid": _uid(kind, name), "attrs": attributes, "parents": parents})
    return found


def _uid(kind: str, name: str) -> dict[str, str]:
    return {"type": kind, "id": name}


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _short(error: object) -> str:
    return " ".join(str(error).split())[:400]
