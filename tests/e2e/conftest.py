"""One pair of agents and one warm guest for each module; what kills an agent starts it again."""

from collections.abc import Iterator

import pytest

from tests.e2e.rig import Rig, make_rig


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with make_rig() as made:
        yield made


@pytest.fixture(autouse=True)
def _show_agents(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print what the agents said, which pytest shows where a test fails."""
    yield
    if "rig" in request.fixturenames:
        rig: Rig = request.getfixturevalue("rig")
        for end in (rig.pair.a, rig.pair.b):
            if end.agent:
                print(f"--- {end.name}\n{end.agent.output[-3000:]}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes minutes runs only where it is asked for."""
    if "matrix" in config.option.markexpr:
        return
    kept = [item for item in items if item.get_closest_marker("matrix") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
