"""A command line and an agent of different versions: both are named, and what mends it."""

import json

import pytest

from sealane.errors import UsageError, make_error
from sealane.host.models import Vm
from sealane.host.skew import AGENT_IS_OLDER, own_version
from tests.cli.conftest import Run
from tests.cli.stand_in import StandIn


class _NewerVm(Vm):
    mood: str = "good"


@pytest.mark.parametrize("version", [None, "0.0.9+00000000"], ids=["from before it told", "that tells"])
def test_an_agent_that_does_not_know_an_option(agent: StandIn, run: Run, version: str | None) -> None:
    agent.version = version
    agent.refusal = (
        UsageError("usage.argument", "group_max: Extra inputs are not permitted")
        if version is None
        else make_error(
            "agent.version",
            "the caller is Sealane 1, and this agent 0: it does not know `group_max`",
            mend=AGENT_IS_OLDER,
        )
    )
    result = run("migrate", "web01", "host-b")
    assert result.exit_code == 6
    assert result.stderr.splitlines()[0].endswith(" agent.version")
    for words in (own_version(), version or "an older one", "group_max", "restart the agent"):
        assert words in result.stderr
    (told,) = [json.loads(line) for line in run("migrate", "web01", "host-b", "--json").stdout.splitlines()]
    assert (told["code"], told["mend"]) == ("agent.version", AGENT_IS_OLDER)


def test_an_agents_own_refusals_are_left_alone(agent: StandIn, run: Run) -> None:
    agent.refusal = UsageError("usage.argument", "domains of libvirt are found, and not registered")
    assert "agent.version" not in run("migrate", "web01", "host-b").stderr


def test_an_agent_that_tells_more_than_is_known_here(agent: StandIn, run: Run) -> None:
    agent.version = "9.0.0+99999999"
    agent.vms["web01"] = _NewerVm(**agent.vms["web01"].model_dump())
    result = run("vm", "list", "--json")
    (told,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert (result.exit_code, told["code"]) == (6, "agent.version")
    assert "9.0.0+99999999" in told["detail"]


def test_one_version_whose_answer_does_not_fit_is_a_fault(agent: StandIn, run: Run) -> None:
    agent.vms["web01"] = agent.vms["web01"].model_copy(update={"state": "bogus"})
    result = run("vm", "list")
    assert result.exit_code == 70
    assert result.stderr.splitlines()[0].endswith(" internal.error")


def test_the_doctor_compares(agent: StandIn, run: Run) -> None:
    assert "this command line is" not in run("doctor").stdout
    agent.version = "0.0.9+00000000"
    assert f"runs Sealane 0.0.9+00000000, this command line is {own_version()}" in run("doctor").stdout
