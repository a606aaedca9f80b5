"""What all tests share."""

import pathlib
from collections.abc import Iterator

import jax
import pytest

_MAPS = pathlib.Path("/proc/self/maps")
_MOST_MAPS = 20_000


@pytest.fixture(autouse=True)
def compiled_programs_are_dropped() -> Iterator[None]:
    """Frees them where they take many pieces of memory, of which Linux allows 65,530."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
