"""Real evidence lies beside the checkout and never in it; tests that want it skip, saying so, where it is absent."""

from pathlib import Path

import pytest

VECTORS = Path(__file__).parents[3] / "shared" / "vectors"


@pytest.fixture
def vectors() -> Path:
    if not (VECTORS / "attestation").is_dir():
        pytest.skip("no real vectors in ../shared/vectors")
    return VECTORS
