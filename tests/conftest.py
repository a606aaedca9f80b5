"""What all tests share."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def programs_are_dropped() -> Iterator[None]:
    """Frees a module's compiled programs, whose pieces of memory Linux counts (65,530 at most)."""
    yield
    jax.clear_caches()
