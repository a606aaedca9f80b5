"""A machine whose GPU JAX does not find, or whose memory is too small."""

import types

import jax
import pytest
import test_train
from absl import app

from ada_jax.errors import UserError
from ada_jax.run import cli, devices, setup


@pytest.fixture
def gpu_machine(tmp_path, monkeypatch):
    """Device files of a GPU, and no word of which platform to use."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield tmp_path
    jax.config.update("jax_platforms", before)


def test_a_gpu_without_the_plugin_is_told(gpu_machine, monkeypatch):
    monkeypatch.setattr(devices, "_has_plugin", lambda cuda: False)
    with pytest.raises(UserError, match=r"has an NVIDIA GPU.*-e '\.\[cuda\]'.*JAX_PLATFORMS=cpu"):
        devices.check_gpu(gpu_machine)


@pytest.mark.parametrize(
    ("plugin", "driver", "said"),
    [
        ("cuda13", "535.183.01", "the driver 535 is too old for JAX (580 is needed)"),
        ("cuda12", "470.57.02", "the driver 470 is too old for JAX (525 is needed)"),
        ("cuda12", "535.183.01", "says why CUDA does not start"),
        ("cuda13", None, "says why CUDA does not start"),
    ],
)
def test_why_the_plugin_does_not_start(tmp_path, monkeypatch, plugin, driver, said):
    monkeypatch.setattr(devices, "_has_plugin", lambda cuda: cuda == plugin)
    version = tmp_path / "version"
    if driver:
        version.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Sun May 12")
    assert said in devices._advice(version)


def test_a_cpu_is_a_cpu(gpu_machine):
    (gpu_machine / "nvidia0").unlink()  # A driver, but no GPU for this container.
    devices.check_gpu(gpu_machine)


@pytest.mark.parametrize("cpu_devices", [0, 2])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Unable to initialize 'cuda'\n(a long story)"), r" \(Unable to .*\): "),
        (AssertionError(), ": "),  # JAX_PLATFORMS=cuda without a plugin
    ],
)
def test_a_platform_that_does_not_start_is_told(monkeypatch, error, said, cpu_devices):
    def fail():
        raise error

    monkeypatch.setattr(jax, "default_backend", fail)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    with pytest.raises(UserError, match=rf"JAX_PLATFORMS=\S+ does not start{said}"):
        cli.set_up_devices(cpu_devices, "")


def test_configs_for_cpus_only_warn(monkeypatch):
    def complain():
        raise UserError("The machine has an NVIDIA GPU.")

    monkeypatch.setattr(devices, "check_gpu", complain)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    cli.set_up_devices(2, "")
    with pytest.raises(UserError, match="NVIDIA"):
        cli.set_up_devices(0, "")


@pytest.mark.parametrize(("own", "used"), [("/own", "/own"), (None, "/config")])
def test_a_user_s_own_folder_of_compiled_programs_takes_precedence(monkeypatch, own, used):
    monkeypatch.setattr(devices, "check_gpu", lambda: None)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", own)
    try:
        cli.set_up_devices(0, "/config")
        assert jax.config.jax_compilation_cache_dir == used
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(("most", "calls"), [(2**30, [2**30]), (2**25, [2**30, 2**25]), (0, None)])
def test_an_old_c_library_keeps_freed_memory_too(monkeypatch, most, calls):
    made = []

    def mallopt(parameter, value):
        made.append((parameter, value))
        return int(parameter != -3 or value <= most)

    monkeypatch.setattr(cli.ctypes, "CDLL", lambda _: types.SimpleNamespace(mallopt=mallopt))
    cli._keep_freed_memory()
    # The trim threshold would stop the other one from growing.
    trim = [] if calls is None else [(-1, 2**31 - 1)]
    assert made == [(-3, value) for value in calls or [2**30, 2**25]] + trim


def test_perturbations_that_do_not_fit_are_told_before_anything_is_compiled(monkeypatch):
    parts = setup.build(test_train.tiny())
    setup.check_memory(parts.nets, 16)  # A CPU does not say.
    numbers = sum(a.size for a in jax.tree.leaves(parts.nets[0].theta))
    monkeypatch.setattr(devices, "device_memory", lambda: 12 * numbers * 9)
    with pytest.raises(
        UserError, match=r"attacks 16 examples at once.*Set it to 4, or a smaller divisor"
    ):
        setup.check_memory(parts.nets, 16)
    setup.check_memory(parts.nets, 16, group=2)
    monkeypatch.setattr(devices, "device_memory", lambda: 12 * numbers * 16)
    setup.check_memory(parts.nets, 16)


def test_a_full_device_is_one_sentence(monkeypatch, capsys):
    def main(argv):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")

    monkeypatch.setattr(app, "run", lambda guarded, flags_parser: guarded(["x"]))
    with pytest.raises(SystemExit) as left:
        cli.start(main)
    assert left.value.code == 2
    assert "too little memory (RESOURCE_EXHAUSTED" in capsys.readouterr().err
