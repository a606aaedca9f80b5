"""The local devices: whether JAX uses the GPU, and how much memory they have."""

import importlib.util
import pathlib
import re

import jax

from ada_jax.errors import UserError

_LEAST_DRIVERS = {"cuda13": 580, "cuda12": 525}  # NVIDIA's driver that each of JAX's plugins needs


def check_platform() -> None:
    """Starts JAX's platform.

    Raises:
      UserError: the platform of JAX_PLATFORMS does not start.
    """
    try:
        jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # The latter for CUDA without its plugin.
        platforms = jax.config.jax_platforms
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise UserError(
            f"JAX_PLATFORMS={platforms} does not start{reason}: "
            f"{_advice() if 'cuda' in str(platforms) else 'leave it unset.'}"
        ) from error


def check_gpu(dev: pathlib.Path = pathlib.Path("/dev")) -> None:
    """Checks that JAX uses the machine's NVIDIA GPU, if it has one.

    Args:
      dev: the folder of device files.

    Raises:
      UserError: JAX uses the CPU by default.
    """
    asked = jax.config.jax_platforms
    if jax.default_backend() == "cpu" and not asked and any(dev.glob("nvidia[0-9]*")):
        raise UserError(
            f"The machine has an NVIDIA GPU, but JAX runs on the CPU: {_advice()} "
            "Set JAX_PLATFORMS=cpu to use the CPU."
        )


def _advice(version: pathlib.Path = pathlib.Path("/proc/driver/nvidia/version")) -> str:
    """How to make JAX use the GPU."""
    plugins = [cuda for cuda in _LEAST_DRIVERS if _has_plugin(cuda)]
    found = re.search(r" (\d+)\.\d+", version.read_text()) if version.exists() else None
    driver = int(found[1]) if found else 0
    if not plugins:
        return "install JAX for CUDA by ending the installation with -e '.[cuda]'."
    if found and driver < (least := min(_LEAST_DRIVERS[cuda] for cuda in plugins)):
        return f"the driver {driver} is too old for JAX ({least} is needed): update it."
    return "`python -c 'import jax; jax.devices(\"cuda\")'` says why CUDA does not start."


def _has_plugin(cuda: str) -> bool:
    try:
        return importlib.util.find_spec(f"jax_plugins.xla_{cuda}") is not None
    except ModuleNotFoundError:  # No plugins are installed.
        return False


def device_memory() -> int | None:
    """Bytes available on each local device; None if JAX does not know, as on CPUs."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [s["bytes_limit"] for s in stats if "bytes_limit" in s]
    return min(limits) if len(limits) == len(stats) else None
