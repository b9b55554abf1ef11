"""A short sample of `./run soak`: the VM goes back and forth, some moves cancelled or cut, and nothing grows."""

from dataclasses import replace

import pytest

from sealane.testing.soak import _SLACK, Sample, Story, grown, page, run

SAMPLE = Sample("a", 1, 16, 3, 100 << 20, 80 << 20, 3, 5, 1, 1)


@pytest.mark.parametrize("name", sorted(_SLACK))
def test_growth_is_found(name: str) -> None:
    more = getattr(SAMPLE, name) + _SLACK[name] + 1
    assert not grown([SAMPLE, SAMPLE, replace(SAMPLE, **{name: more - 1})])
    assert f"{name} grew" in grown([SAMPLE, SAMPLE, replace(SAMPLE, **{name: more})])[0]


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_twelve_moves() -> None:
    story = Story(seed=1)
    run(story, 12, every=4, minutes=10)
    assert not story.problems, page(story)
    assert story.moves == 12
    assert sum(story.endings.values()) == 12
    assert {each.moves for each in story.samples} == {4, 8, 12}
    assert "each once" in page(story)
