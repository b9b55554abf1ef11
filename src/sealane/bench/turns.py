"""Ways that are measured in turns, in another order each round."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turn(ways: Sequence[T], number: int) -> list[T]:
    """The ways in the order of that round: what one leaves behind, caches and freed memory, is met by each of them."""
    first = number % len(ways)
    return [*ways[first:], *ways[:first]]
