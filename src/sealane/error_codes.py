"""The catalogue of error codes, by the family of each: a class of `sealane.errors`.

Every failure that a user, a peer or a caller of the REST interface can meet stands here. docs/errors.md is made from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Entry:
    """What the catalogue knows of one code: what it means, what usually mends it, whether trying again can help."""

    summary: str
    mend: str
    retryable: bool = False


_HOST_RUNS = "nothing to do; the VM was not touched"
_RETRY = "try again; if it stays, look at `sealane status` and the logs of both agents"
_NETWORK = "look at the network between the hosts: something on it changed, repeated or dropped bytes"

_RELAYED = "find out who stands between the hosts: somebody passes on what was meant for others"
_SOFTWARE = "compare the versions on both hosts; if the change is meant, renew the reference values"

_CA_JOIN = "let the peer join the CA again: `sealane ca invite` on the CA's host, `sealane ca join` there"
_CA_STOLEN = "look into it: who shows it may hold the CA's key"

_STREAM = "compare the QEMU versions of both hosts, and see QEMU's own log at the source"

_TPM_STATE = "the VM runs on at the source; find out what stands between QEMU and its TPM on either host"
FAMILIES: Final[Mapping[str, Mapping[str, Entry]]] = {
    "UsageError": {
        "usage.argument": Entry("an argument does not fit", "see `--help` of the command"),
        "usage.configuration": Entry("the configuration file does not fit", "mend the line that is named"),
        "protection.weak": Entry(
            "this protection leaves a part of the VM readable on the network",
            "leave --protection out (sealed), or add --i-know-this-is-weak where that is wanted, for experiments",
        ),
    },
    "EvidenceError": {
        "lab.capture": Entry(
            "this is no capture that the lab can read",
            "capture with tcpdump -w FILE and name that file; without one, the lab simulates hosts and overhears them",
        ),
        "attest.unknown-kind": Entry(
            "this is no kind of evidence or collateral that Sealane knows",
            "docs/attestation.md lists the kinds; is the file whole, and not in hexadecimal or base64?",
        ),
        "attest.malformed": Entry("the evidence does not fit its format", "fetch it again from where it was made"),
        "attest.too-large": Entry("the evidence is larger than any of its kind can be", "is it the right file?"),
        "attest.reference": Entry("the file of reference values does not fit", "mend the line that is named"),
        "attest.reference-signature": Entry(
            "the file of reference values is not signed by the key that was given",
            "fetch file and key again from who signs them",
        ),
        "receipt.malformed": Entry(
            "this is no receipt, or one that was changed",
            "see `sealane receipts verify`; the other end may hold a copy",
        ),
    },
    "PeerError": {
        "vtpm.blob-malformed": Entry("what came in place of a TPM's state is no sealed state", _TPM_STATE),
        "vtpm.blob-foreign": Entry("the TPM's state that came is another VM's", _TPM_STATE),
        "vtpm.blob-epoch": Entry("the TPM's state that came is of another epoch", _TPM_STATE),
        "vtpm.blob-type": Entry("one part of the TPM's state came in the place of another", _TPM_STATE),
        "vtpm.blob-migration": Entry("the TPM's state that came is of another migration", _TPM_STATE),
        "vtpm.blob-altered": Entry("the TPM's state was changed on its way", _TPM_STATE),
        "vtpm.not-brought": Entry("the VM came without its TPM's state", _TPM_STATE),
        "peer.unreachable": Entry(
            "no connection to the peer", "is its agent up, its address right, its port open?", True
        ),
        "peer.unknown": Entry(
            "the peer's certificate is not trusted", "compare fingerprints, then `sealane trust add`"
        ),
        "peer.expired": Entry(
            "the peer's certificate has expired", "run `sealane init --renew` there and trust the new one"
        ),
        "peer.not-yet-valid": Entry("the peer's certificate is not valid yet", "set the clocks of both hosts"),
        "peer.tls": Entry("the TLS handshake failed", "is it a Sealane agent that listens there? compare versions"),
        "peer.tls-version": Entry("the peer does not speak TLS 1.3", "bring the peer to a current Sealane"),
        "peer.preface": Entry("a connection did not open as Sealane's do", "see which program connects to the port"),
        "peer.slow": Entry("the peer did not answer in time", _RETRY, True),
        "peer.closed": Entry("the peer closed the channel", "see the peer's log", True),
        "peer.message": Entry(
            "the peer sent a message that does not fit", "bring both hosts to the same Sealane version"
        ),
        "peer.version": Entry(
            "the peer speaks another protocol version", "bring both hosts to the same Sealane version"
        ),
        "peer.busy": Entry("the peer is at its limit of migrations", "wait for the others to end", True),
        "peer.rate": Entry(
            "one peer asks for more migrations a minute than a host lets it",
            "try again in a minute; `limits.wishes_per_peer_per_minute` at the destination says how many",
            True,
        ),
        "libvirt.refused": Entry(
            "the source asked this host's libvirtd for what no migration of this domain needs",
            "compare the versions of libvirt and of Sealane on both hosts; if they fit, somebody at the source tries more",
        ),
        "libvirt.malformed": Entry(
            "what came for libvirtd is not libvirt's protocol", "compare the versions of libvirt on both hosts"
        ),
        "pairing.code": Entry(
            "the pairing code is not the one that the other end shows",
            "type it again; after three wrong tries it is void, and `sealane pair` shows a new one",
        ),
        "pairing.closed": Entry(
            "the other end does not pair", "run `sealane pair` there first, and use the code that it shows", True
        ),
        "pairing.tpm": Entry(
            "the other end's TPM did not prove the keys that it shows",
            "look into that host: its attestation key does not live in the TPM that it shows",
        ),
        "pairing.mismatch": Entry(
            "what the other end showed does not belong to it",
            "somebody may stand between the hosts: pair over another network, or compare fingerprints by hand",
        ),
        "ca.malformed": Entry("what the peer shows is no host certificate of a CA", _CA_JOIN),
        "ca.not-a-host": Entry("a CA's certificate was shown in place of a host's", _CA_STOLEN),
        "ca.key": Entry("the host certificate is over another key than the peer's", _CA_JOIN),
        "ca.unknown": Entry(
            "no CA that this host trusts has signed the peer's host certificate",
            "see `sealane ca status` on both hosts: they have to belong to one CA",
        ),
        "ca.authority-over": Entry(
            "the CA's own certificate is not valid now", "make a new CA, and let the hosts join"
        ),
        "ca.not-yet-valid": Entry("the peer's host certificate is not valid yet", "set the clocks of both hosts"),
        "ca.expired": Entry(
            "the peer's host certificate has expired",
            "see `sealane ca status` there: its agent renews it where the CA's host answers",
            True,
        ),
        "ca.revoked": Entry(
            "the CA has revoked the peer", "if that is not meant: `sealane ca approve` on the CA's host"
        ),
        "ca.list": Entry("the CA's revocation list is missing or not good", "run `sealane ca renew` on this host"),
        "ca.list-stale": Entry(
            "the CA's revocation list is too old to rely on",
            "is the CA's host up? `sealane ca renew` fetches a new one; `authority.stale_list` says what is accepted",
            True,
        ),
        "ca.name": Entry("the CA vouches for this peer under another name", "see `sealane ca list` on the CA's host"),
        "ca.level": Entry(
            "the CA found the peer at a lower level than this host wants",
            "see `sealane ca list` on the CA's host for what it found",
        ),
        "ca.not-enrolled": Entry(
            "the CA does not know this host", "run `sealane ca invite` on the CA's host, and `sealane ca join` here"
        ),
        "lane.integrity": Entry("a record did not open: it was changed on the way", _NETWORK),
        "lane.replay": Entry("a record came a second time", _NETWORK),
        "lane.reordered": Entry("a record came out of order, or one is missing", _NETWORK),
        "lane.foreign": Entry("a record belongs to another lane or migration", _NETWORK),
        "lane.malformed": Entry("a record's header does not fit", _NETWORK),
        "lane.truncated": Entry("a lane ended without its authenticated close", _NETWORK, True),
        "lane.after-close": Entry("bytes came after a lane's authenticated close", _NETWORK),
        "lane.cut": Entry("a lane's connection broke", _NETWORK, True),
        "wire.malformed": Entry("the migration stream contradicts its format", _STREAM),
        "wire.truncated": Entry("the migration stream ended too early", _STREAM, True),
        "wire.limit": Entry("the migration stream asks for more than any QEMU does", _STREAM),
    },
    "AttestationRejected": {
        "attest.order": Entry(
            "a message of the attested handshake came out of turn", "bring both hosts to the same Sealane version"
        ),
        "attest.role": Entry("a message of the attested handshake came back to its sender", _RELAYED),
        "attest.migration": Entry("the peer's evidence is of another migration, VM or epoch", _RELAYED),
        "attest.nonce": Entry("the peer's evidence answers another question: its nonce is stale or not ours", _RELAYED),
        "attest.authentication": Entry("a message of the attested handshake is not from the attested peer", _RELAYED),
        "attest.binding": Entry(
            "the peer's evidence is not bound to this channel: it is old, or somebody else's", _RELAYED
        ),
        "attest.too-often": Entry(
            "the source has this host attest more often than anybody needs",
            "look at the source: its `attestation.again_every_s`",
        ),
        "attest.host-unknown": Entry(
            "no reference value vouches for the hardware that gave the evidence",
            "add the host's attestation key to the reference values, after its TPM has proved it (docs/attestation.md)",
        ),
        "attest.endorsement": Entry(
            "the certificate of a TPM's endorsement key does not lead to a root that is trusted here",
            "name the maker's root in `attestation.tpm_roots`; a software TPM has none that counts",
        ),
        "attest.hardware-changed": Entry(
            "the peer shows other hardware than when it was paired or enrolled, or none",
            "where its TPM was replaced on purpose: `sealane trust remove` and pair again, or let it join its CA again",
        ),
        "attest.test-root": Entry(
            "the peer's evidence rests on a test root, which this host does not accept",
            "accept it with `attestation.accepted_test_roots`, for tests only",
        ),
        "attest.enclave-changed": Entry("the peer's enclave runs other code than the reference values have", _SOFTWARE),
        "attest.qemu-changed": Entry("the peer's QEMU is none that the reference values have", _SOFTWARE),
        "attest.log-replay": Entry(
            "the peer's measurement logs do not replay to its PCRs",
            "restart that host; if it stays, look into it: a log lies",
        ),
        "attest.refused": Entry(
            "the peer's evidence was refused", "see the reasons; docs/attestation.md explains them"
        ),
        "attest.level": Entry(
            "the peer reaches a lower trust level than this host wants",
            "see the reasons; lower `attestation.least_level` only if less is enough",
        ),
        "attest.changed": Entry("what the peer attests changed during the copy", _SOFTWARE),
    },
    "HostError": {
        "vtpm.swtpm": Entry("swtpm did not do what was asked", "see the message, and `sealane doctor`"),
        "vtpm.root": Entry("the host's TPM did not keep or give a vTPM's key", "see the message, and `sealane doctor`"),
        "vtpm.keeper": Entry("a vTPM's keeper did not do what was asked", "see its log below the state directory"),
        "vtpm.record": Entry("what the agent keeps of a vTPM cannot be read or written", "see the message"),
        "vtpm.control": Entry("QEMU asked its TPM for something unknown", "which QEMU is it? please report it"),
        "quoting.failed": Entry("the quoting process gave no evidence", "see the agent's log"),
        "quoting.qemu": Entry(
            "the QEMU that was launched is not the one that was measured",
            "name QEMU's own binary in the VM's launch command, and not a script that chooses one",
        ),
        "quoting.slow": Entry("the quoting process did not answer in time", _RETRY, True),
        "quoting.driver": Entry("a root of trust did not do what was asked", "see the message, and `sealane doctor`"),
        "quoting.pcr": Entry(
            "the PCR for Sealane's log was extended by something else", "choose another one: `attestation.pcr`"
        ),
        "enclave.changed": Entry(
            "a file that enclaves load was changed since it was measured",
            "if the change is meant, restart the agent, which measures anew",
        ),
        "host.identity-missing": Entry("this host has no identity", "run `sealane init`"),
        "ca.locked": Entry(
            "the CA's key cannot be opened",
            "give its passphrase: --passphrase-file, or `authority.passphrase_file` for the agent",
        ),
        "host.store": Entry(
            "the journal cannot be read or written", "look at the free space and the permissions of the state directory"
        ),
        "host.disk-full": Entry("no space is left for the journal", "free some space in the state directory", True),
        "policy.broken": Entry(
            "the policy cannot be read, and so it allows nothing",
            "mend the file that is named; `sealane policy show` reads it again",
        ),
        "host.permission": Entry("a file or socket is not accessible", "run as root, or give the agent's user access"),
        "host.port": Entry("the port cannot be opened", "is another agent running? choose another with --listen"),
        "vm.unreachable": Entry(
            "QEMU does not answer on the VM's QMP socket", "is the VM up, and no other client on its QMP socket?", True
        ),
        "vm.qmp": Entry("QEMU refused a command", "see the message"),
        "guest.layout": Entry(
            "QEMU's description of the guest's memory cannot be understood",
            "see docs/classifier.md for what it must be",
        ),
        "guest.memory": Entry(
            "the guest's memory cannot be read", "is the VM up, and may the agent's user trace its QEMU (ptrace(2))?"
        ),
        "launch.failed": Entry(
            "the destination's QEMU did not start", "run the VM's launch command by hand on the destination"
        ),
        "launch.slow": Entry(
            "the destination's QEMU did not answer in time",
            "run the VM's launch command by hand on the destination",
            True,
        ),
        "migration.qemu-failed": Entry("QEMU ended the migration", "see the message"),
        "migration.destination-died": Entry(
            "the destination's QEMU ended in mid-stream", "see the QEMU log at the destination"
        ),
        "migration.hook-failed": Entry("the switch-over hook said no", "see the hook's own output"),
        "libvirt.missing": Entry(
            "libvirt's binding for Python is not installed",
            "install Debian's libvirt-dev, and then the extra: pip install 'sealane[libvirt]'; or move VMs by their QMP sockets",
        ),
        "libvirt.unreachable": Entry("libvirtd does not answer", "is libvirtd running? see `virsh list`", True),
        "libvirt.failed": Entry("libvirt could not do it", "see the log of libvirtd at both hosts", True),
        "enclave.died": Entry("the enclave process ended", "see the agent's log", True),
        "enclave.unconfined": Entry(
            "the enclave's sandbox lacks what the configuration requires",
            "`sealane doctor` says what is missing and how to mend it; `sandbox` in agent.toml says what is required",
        ),
        "enclave.slow": Entry("the enclave process did not answer in time", _RETRY, True),
        "demo.prerequisite": Entry(
            "the demonstration lacks something on this machine",
            "run `./run setup` (or `python -m sealane.testing setup`), which fetches what is missing",
        ),
        "lab.failed": Entry(
            "an experiment of the lab could not be made", "run it again with -v; `./run setup` fetches what is missing"
        ),
        "demo.failed": Entry("a check of the demonstration did not hold", "run it again with -v, and please report it"),
    },
    "ControlError": {
        "agent.unreachable": Entry(
            "no agent answers on this host", "start it: `systemctl start sealane`, or `sealane agent`"
        ),
        "agent.version": Entry(
            "the command line and the agent are of different versions",
            "restart the agent: `systemctl restart sealane`; `sealane doctor` compares the two",
        ),
        "agent.running": Entry("an agent already runs here", "use that one, or stop it first"),
        "agent.stopping": Entry("the agent is stopping", "start it again, then try again", True),
        "agent.restarted": Entry("the agent was restarted while the migration ran", _RETRY, True),
        "identity.exists": Entry(
            "this host has an identity already", "keep it; `sealane init --renew` makes a new certificate"
        ),
        "trust.unknown": Entry("no such peer", "see `sealane trust list`; add it with `sealane trust add`"),
        "trust.exists": Entry("a peer of that name has another fingerprint", "remove it first, if the change is meant"),
        "trust.no-address": Entry(
            "the peer has no address", "add one: `sealane trust add NAME FINGERPRINT --address HOST`"
        ),
        "ca.exists": Entry("this host has a CA, or belongs to one, already", "see `sealane ca status`"),
        "ca.none": Entry("this host has no CA, or belongs to none", "see `sealane ca status` and `sealane ca --help`"),
        "ca.host-unknown": Entry("the CA knows no host of that name", "see `sealane ca list`"),
        "pairing.over": Entry(
            "the pairing is over: paired, cancelled, expired, or tried in vain too often",
            "run `sealane pair` again for a new code",
        ),
        "vm.unknown": Entry("no such VM on this host", "see `sealane vm list`; add it with `sealane vm add`"),
        "vm.exists": Entry("a VM of that name is there already", "choose another name, or remove that one"),
        "vm.busy": Entry("the VM is in a migration already", "see `sealane status`, or `sealane cancel` it"),
        "vm.not-running": Entry("the VM does not run here", "see `sealane vm list`"),
        "migration.unknown": Entry("no such migration", "see `sealane status`"),
        "migration.over": Entry("the migration has ended already", "see `sealane status`"),
        "migration.too-late": Entry("the hand-over has begun and can no longer be cancelled", "wait for its end"),
        "migration.no-convergence": Entry(
            "the guest writes faster than the copy goes",
            "raise --max-bandwidth, let QEMU slow the guest down with --on-stall auto-converge, or try at a quieter time",
            True,
        ),
        "migration.postcopy-paused": Entry(
            "postcopy was cut half-way and could not be joined again",
            "mend the network between the hosts, leave both QEMUs as they are, and say `sealane resolve VM --ask` at the source: "
            "it joins the halves again (docs/handover.md says how to do it by hand, and what if a half is lost)",
            True,
        ),
        "migration.time-limit": Entry(
            "the migration took longer than it may",
            "see why it is slow (`sealane status`); `limits.time_max_s` or --time-limit says how long it may take",
            True,
        ),
        "queue.changed": Entry(
            "the peer or the VM was changed while the migration waited in the queue",
            "see `sealane trust list` and `sealane vm list`, then ask for it again",
        ),
        "queue.lost": Entry(
            "the agent ended while the migration waited in the queue; the VM was not touched",
            "ask for it again: `sealane migrate VM HOST`, or `sealane evacuate` for what is left",
            True,
        ),
        "queue.full": Entry(
            "no more migrations may wait here", "wait for the others to begin, or raise `limits.queue_max`", True
        ),
        "evacuation.incomplete": Entry(
            "not all VMs went", "see the reason of each; what did not go runs on where it ran", True
        ),
        "migration.cancelled": Entry("the migration was cancelled", _HOST_RUNS),
        "policy.denied": Entry(
            "the policy does not allow this move",
            "see `sealane policy check VM HOST` on the host that refused; its policy is in /etc/sealane/policy",
        ),
        "policy.level-too-low": Entry(
            "the other host has not reached the trust level that the VM asks for",
            "choose another host (`sealane hosts --for VM`), or bring that one to the level",
        ),
        "receipt.unknown": Entry("no such receipt", "see `sealane receipts list`"),
        "protection.not-allowed": Entry(
            "this host's configuration does not allow that protection",
            "leave --protection out (sealed), or add it to `allowed_protections` on both hosts",
        ),
        "check.protection": Entry(
            "the destination's configuration does not allow that protection",
            "leave --protection out (sealed), or add it to `allowed_protections` there",
        ),
        "check.vm-unknown": Entry(
            "the destination does not know the VM", "add it there: `sealane vm add NAME --qmp PATH --launch-incoming …`"
        ),
        "check.vm-present": Entry("the VM runs at the destination already", "see `sealane vm list` there"),
        "check.no-launch": Entry(
            "the destination has no launch command for the VM", "add it there with --launch-incoming"
        ),
        "check.qemu-version": Entry(
            "the destination's QEMU is older than the source's machine allows", "bring QEMU there to the same version"
        ),
        "check.machine-type": Entry(
            "the machine types differ", "launch the destination with the source's versioned machine type"
        ),
        "check.memory": Entry("the memory sizes differ", "launch the destination with the source's -m"),
        "check.capabilities": Entry("a migration capability is missing", "bring both QEMUs to versions that have it"),
        "check.postcopy": Entry(
            "postcopy is not possible between these two QEMUs",
            "on the destination QEMU needs userfaultfd: run it as root, let it open /dev/userfaultfd, or set "
            "vm.unprivileged_userfaultfd=1 there (`sealane doctor` looks)",
        ),
        "check.disks": Entry(
            "the domain has a disk that Sealane does not let libvirt copy",
            "copied are files, raw or qcow2; mark a disk that both hosts reach <shareable/>, or detach it for the move",
        ),
        "check.volume": Entry(
            "the destination cannot make the file for a disk that is copied",
            "Sealane makes the files itself, in the directories of `storage_directories` in agent.toml there, and never writes "
            "over one that is there: move it away, or make room",
        ),
        "check.free-memory": Entry(
            "the destination has too little free memory", "free some there, or choose another host"
        ),
        "check.cpus": Entry("the numbers of CPUs differ", "launch the destination with the source's -smp"),
        "vtpm.none": Entry("this host keeps no TPM for the VM", "add one: `sealane vm add NAME … --vtpm DIR`"),
        "vtpm.missing": Entry("the VM has no TPM here yet", "make one: `sealane vtpm start VM`"),
        "vtpm.exists": Entry("the VM has a TPM here already", "see `sealane vtpm status VM`"),
        "vtpm.adopt": Entry(
            "the TPM's state lies there in clear", "take it over with `sealane vtpm start VM --adopt`, or move it away"
        ),
        "vtpm.busy": Entry("the VM's TPM is running", "see `sealane vtpm status VM`; stop the VM first"),
        "vtpm.not-running": Entry("the VM's TPM is not running", "start it: `sealane vtpm start VM`"),
        "vtpm.two-migrations": Entry("the VM's TPM goes to one destination already", "see `sealane status`"),
        "vtpm.gone": Entry(
            "the VM's TPM has left this host, and its key was destroyed",
            "it is where the VM is; `sealane receipts list` says where",
        ),
        "vtpm.stale": Entry(
            "an older copy of the TPM's files was put back",
            "find out who did it; put the present files back, or give the TPM up",
        ),
        "vtpm.old-record": Entry(
            "the agent's state directory was put back to an older copy: the host's TPM has counted on",
            "find out who did it; what was sealed then cannot be opened any more",
        ),
        "vtpm.foreign": Entry("the files are those of another VM's TPM", "put the VM's own files back"),
        "vtpm.ahead": Entry(
            "the TPM ended before its last writes were noted: its files are newer than the record, or from earlier in its last run",
            "if nobody can have put them there, `sealane vtpm start VM --after-crash`",
        ),
        "vtpm.altered": Entry(
            "the TPM's files, or the record of them, were changed", "put the files back as they were written"
        ),
        "vtpm.key-gone": Entry(
            "the key of the TPM's files does not exist any more", "restore nothing: it left, or was rotated"
        ),
        "check.vtpm": Entry(
            "one end has a TPM for the VM and the other none", "add the VM with --vtpm on both hosts, or on neither"
        ),
        "handover.refused": Entry("the destination refused the hand-over", "see the destination's log"),
        "handover.operator": Entry(
            "an operator decided that the VM is this host's", "see `sealane status`: who, and why"
        ),
        "handover.half-lost": Entry(
            "an operator decided that the other half of the VM's memory is lost: this one was ended, and the VM with it",
            "see `sealane status`: who, and why; start the VM anew from its disks",
        ),
        "resolve.not-in-doubt": Entry(
            "no migration of that VM is in doubt here, or has its halves parted",
            "see `sealane status`; doubts are resolved at the source",
        ),
        "resolve.half": Entry(
            "this host has a part of the VM's memory, and half a memory cannot run",
            "`sealane resolve VM --ask` at the source joins the halves again",
        ),
        "resolve.could-make-two": Entry(
            "the VM may run at the destination; taking it back could make two of it",
            "end it at the destination first (power the host off, or kill its QEMU), then say --i-have-looked",
        ),
        "resolve.could-lose-it": Entry(
            "the copy here may be the last one; ending it could lose the VM",
            "see at the destination that the VM runs there, then say --i-have-looked",
        ),
        "resolve.against-the-answer": Entry(
            "the destination's answer says otherwise", "do as it says: `sealane resolve VM --ask`"
        ),
        "handover.digest": Entry("the two ends saw different streams", _NETWORK),
    },
    "InDoubtError": {
        "handover.in-doubt": Entry(
            "the VM is paused here and may run there",
            "the agent goes on asking the destination; `sealane resolve VM --ask` asks now, and `sealane resolve --help` "
            "says what to do where it cannot answer",
        ),
        "resolve.parted": Entry(
            "the two halves of the VM's memory are not joined yet",
            "`sealane status` shows how it goes; `sealane resolve VM --ask` at the source tries again, and "
            "`sealane resolve --help` says what to do where the other half is lost for good",
        ),
    },
    "InternalError": {
        "internal.error": Entry("an unexpected error", "please report it, with the agent's log"),
    },
}
