"""What all tests share."""

import pathlib
from collections.abc import Iterator
from typing import Any

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


@pytest.fixture(scope="session")
def buckets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Google Cloud Storage on this machine, a `gcs.Emulator` with gs://bucket."""
    import gcs

    emulator = gcs.Emulator(tmp_path_factory.mktemp("gcs"), "bucket", "secret", "shown")
    emulator.forbidden.add("secret")
    emulator.read_only.add("shown")
    yield emulator
    emulator.stop()


@pytest.fixture
def cloud(buckets: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same, where all clients of the test and of what it starts find it."""
    for name, value in buckets.environment.items():
        monkeypatch.setenv(name, value)
    return buckets
