"""Networks of PyTorch from safetensors files, which need no PyTorch."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ada_jax import import_weights
from ada_jax.errors import UserError
from ada_jax.nets import corruption_nets
from tests.conftest import assert_mistake, run_here

THETA = jax.tree.map(np.asarray, corruption_nets.make("edsr_small").theta)


@pytest.fixture(autouse=True)
def without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


def written(path, dtype=np.float32, prefix="", metadata=None, **changes):
    """A state dict as PyTorch's tools write it."""
    state = import_weights.to_torch("edsr_small", THETA) | changes
    flat = {prefix + name: np.ascontiguousarray(a.astype(dtype)) for name, a in state.items()}
    path.write_bytes(safetensors.numpy.save(flat, metadata or {"format": "pt"}))
    return str(path)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("prefix", ["", "module.", "model.module."])
def test_state_dicts_are_imported(tmp_path, dtype, prefix):
    source, out = written(tmp_path / "in.safetensors", dtype, prefix), tmp_path / "out.safetensors"
    import_weights.import_file("edsr", source, str(out))
    theta = corruption_nets.make("edsr_small", weights=str(out)).theta
    rounded = jax.tree.map(lambda a: np.float32(a.astype(dtype)), THETA)
    jax.tree.map(np.testing.assert_array_equal, theta, rounded)


def test_networks_are_exported_to_safetensors(tmp_path):
    source, exported = corruption_nets.WEIGHTS / "cae.safetensors", tmp_path / "cae.safetensors"
    done = run_here("import_weights", "--export", "cae", source, exported)
    assert done.returncode == 0, done.stderr
    import_weights.import_file("cae", str(exported), str(tmp_path / "out"))
    theta = corruption_nets.make("cae", weights=str(tmp_path / "out")).theta
    jax.tree.map(np.testing.assert_array_equal, theta, corruption_nets.make("cae").theta)
    done = run_here("import_weights", "--export", "cae", source, tmp_path / "cae.bin")
    assert_mistake(done, "cae.bin does not end in .pt or .safetensors: rename it.")
    done = run_here("export_weights", source, tmp_path / "a.safetensors")
    assert_mistake(
        done, "is of a corruption network: use python -m ada_jax.import_weights --export"
    )


def test_another_mean_shift_is_refused(tmp_path):
    mean = 255 * np.float32([0.485, 0.456, 0.406])  # ImageNet's
    source = written(tmp_path / "in.safetensors", np.float16, **{"add_mean.bias": mean})
    with pytest.raises(UserError, match=r"add_mean\.bias is .* not DIV2K's fixed mean shift"):
        import_weights.import_file("edsr", source, str(tmp_path / "out"))


def test_flags_of_classifiers_do_not_apply_to_corruption_networks(tmp_path):
    files = (written(tmp_path / "in.safetensors"), tmp_path / "out")
    done = run_here("import_weights", "edsr", *files, "--mean=0,0,0")
    assert_mistake(done, "--mean does not apply to edsr: leave it out.")


def test_only_a_prefix_of_all_names_is_ignored(tmp_path):
    source = written(tmp_path / "in.safetensors", **{"module.tail.1.bias": np.zeros(3)})
    with pytest.raises(
        UserError, match=r"edsr_small, it has 1 unexpected arrays, module\.tail\.1\.bias"
    ):
        import_weights.import_file("edsr", source, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>404</html>", "not a complete safetensors file"),
        (b"", "not a complete safetensors file"),
        (safetensors.numpy.save({"a": np.zeros(2)}), "its first arrays are a"),
        (safetensors.numpy.save({"a": np.zeros(2)})[:-1], "not a complete safetensors file"),
        (b"PK", "PyTorch, which all files except safetensors need, is not installed"),
    ],
)
def test_other_files_are_refused_in_a_sentence(tmp_path, content, said):
    source = tmp_path / ("in.pt" if content == b"PK" else "in.safetensors")
    source.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        import_weights.import_file("edsr", str(source), str(tmp_path / "out"))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_foreign_file_with_our_names_loads_directly(tmp_path):
    flat = {
        f"{name}//{k}": np.float16(a) for name, layer in THETA.items() for k, a in layer.items()
    }
    (tmp_path / "w.safetensors").write_bytes(safetensors.numpy.save(flat, {"format": "pt"}))
    theta = corruption_nets.make("edsr_small", str(tmp_path / "w.safetensors")).theta
    jax.tree.map(np.testing.assert_array_equal, theta, jax.tree.map(np.float16, THETA))
    written(tmp_path / "pt.safetensors")
    with pytest.raises(UserError, match=r"does not fit .* python -m ada_jax\.import_weights"):
        corruption_nets.make("edsr_small", str(tmp_path / "pt.safetensors"))
