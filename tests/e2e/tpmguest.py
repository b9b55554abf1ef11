"""A guest that uses its TPM all the time, and tells on its console what it found."""

import itertools
import re
import time
from pathlib import Path
from typing import Any, Literal

from sealane.errors import SealaneError
from sealane.host.models import VmDefinition, VtpmView
from sealane.testing.pair import AgentHost, Guest, HostPair

_LINE = re.compile(r"tpm (\d+) ek=(\w+) key=(\w+) counter=(\d+) secret=(\w+)")


class TpmGuest:
    """The guest, and what it says of its TPM."""

    def __init__(self, pair: HostPair, guest: Guest) -> None:
        self.pair, self.guest, self.home, self.away = pair, guest, pair.a, pair.b

    def start(self) -> None:
        with self.home.client() as client:
            client.start_vtpm(self.guest.name)
        self.pair.start_guest(self.guest, self.home, warm=False)
        self.wait_uses(2)

    def uses(self) -> list[tuple[str, ...]]:
        return _LINE.findall(self.guest.console.text)

    def wait_uses(self, count: int) -> None:
        wanted, deadline = len(self.uses()) + count, time.monotonic() + 30.0
        while len(self.uses()) < wanted:
            assert "TPM FAILED" not in self.guest.console.text, self.guest.console.lines[-5:]
            assert time.monotonic() < deadline, self.guest.console.lines[-5:]
            time.sleep(0.05)

    def assert_whole(self) -> None:
        """The TPM is the one that it was: nothing changed, the counter missed nothing, the session was always good."""
        self.wait_uses(3)
        uses = self.uses()
        assert "TPM FAILED" not in self.guest.console.text
        assert len({(ek, key) for _, ek, key, _, _ in uses}) == 1
        assert {secret for *_, secret in uses} == {"right"}
        for before, after in itertools.pairwise(uses):
            assert (int(after[0]), int(after[3])) == (int(before[0]) + 1, int(before[3]) + 1)

    def exchange(self) -> None:
        self.home, self.away = self.away, self.home

    def view(self, end: AgentHost) -> VtpmView:
        with end.client() as client:
            return client.vtpm(self.guest.name)

    def refusal(self, end: AgentHost, what: Literal["start", "verify"]) -> str:
        """The code with which the host refuses it."""
        with end.client() as client:
            try:
                client.start_vtpm(self.guest.name) if what == "start" else client.change_vtpm(self.guest.name, what)
            except SealaneError as refused:
                return refused.code
        return "not refused"

    def redefine(self, end: AgentHost, **changes: Any) -> None:
        with end.client() as client:
            known = client.vm(self.guest.name)
            client.remove_vm(self.guest.name)
            facts = known.model_dump(include=set(VmDefinition.model_fields))
            client.add_vm(VmDefinition.model_validate({**facts, **changes}))

    def files(self, end: AgentHost) -> list[Path]:
        """Everything that lies where this host keeps the TPM, its keys among it."""
        places = (end.host.scratch / "vtpm", end.host.paths.state / "vtpm")
        return [path for place in places for path in place.rglob("*") if path.is_file()]
