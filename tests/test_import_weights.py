"""Weights from and to PyTorch: the same function, bit for bit the same numbers, nothing run."""

import os
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ada_jax import import_weights
from ada_jax.errors import UserError
from ada_jax.nets import cae, corruption_nets, edsr
from tests.conftest import assert_mistake, run_here

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[torch]'")
import safetensors.torch  # noqa: E402

nn = torch.nn
SIZES = [(32, 32), (48, 40)]


# ------------------------------------------------------------------- the published networks


def block(width, first, last):
    return nn.Sequential(
        first, nn.Conv2d(width, width, 3), nn.LeakyReLU(), last, nn.Conv2d(width, width, 3)
    )


class TorchCAE(nn.Module):
    def __init__(self):
        super().__init__()
        pad = lambda n: nn.ZeroPad2d(n)  # noqa: E731
        down = lambda i, o: nn.Sequential(pad((1, 2, 1, 2)), nn.Conv2d(i, o, 5, 2), nn.LeakyReLU())  # noqa: E731
        up = lambda i, m, o: nn.Sequential(  # noqa: E731
            nn.Conv2d(i, m, 3), nn.LeakyReLU(), pad(1), nn.ConvTranspose2d(m, o, 2, 2)
        )
        self.e_conv_1, self.e_conv_2 = down(3, 64), down(64, 128)
        self.e_conv_3 = nn.Sequential(nn.Conv2d(128, 32, 5, padding=2), nn.Tanh())
        self.d_up_conv_1, self.d_up_conv_2 = up(32, 64, 128), up(128, 32, 256)
        for i in (1, 2, 3):
            setattr(self, f"e_block_{i}", block(128, pad(1), pad(1)))
            setattr(self, f"d_block_{i}", block(128, pad(1), pad(1)))
        self.d_up_conv_3 = nn.Sequential(
            nn.Conv2d(256, 16, 3),
            nn.LeakyReLU(),
            nn.ReflectionPad2d(2),
            nn.Conv2d(16, 3, 3),
            nn.Tanh(),
        )

    def encode(self, x):
        h = self.e_conv_2(self.e_conv_1(x))
        for i in (1, 2, 3):
            h = h + getattr(self, f"e_block_{i}")(h)
        return self.e_conv_3(h)

    def decode(self, bits):
        h = self.d_up_conv_1(bits)
        for i in (1, 2, 3):
            h = h + getattr(self, f"d_block_{i}")(h)
        return self.d_up_conv_3(self.d_up_conv_2(h))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        conv = lambda: nn.Conv2d(width, width, 3, padding=1)  # noqa: E731
        self.body = nn.Sequential(conv(), nn.ReLU(), conv())

    def forward(self, x):
        return x + self.body(x)


class TorchEDSR(nn.Module):
    """Works on 0..255."""

    def __init__(self, blocks, features, scale):
        super().__init__()
        conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1)  # noqa: E731
        self.sub_mean, self.add_mean = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        mean = 255 * torch.tensor([0.4488, 0.4371, 0.4040])
        for shift, sign in ((self.sub_mean, -1), (self.add_mean, 1)):
            shift.weight.data = torch.eye(3).view(3, 3, 1, 1)
            shift.bias.data = sign * mean
        self.head = nn.Sequential(conv(3, features))
        residuals = [Residual(features) for _ in range(blocks)]
        self.body = nn.Sequential(*residuals, conv(features, features))
        steps = {1: 0, 2: 1, 4: 2}[scale]
        ups = [m for _ in range(steps) for m in (conv(features, 4 * features), nn.PixelShuffle(2))]
        self.tail = nn.Sequential(nn.Sequential(*ups), conv(features, 3))

    def forward(self, x):
        x = self.head(self.sub_mean(x))
        return self.add_mean(self.tail(x + self.body(x)))


def torch_edsr(preset):
    torch.manual_seed(0)
    return TorchEDSR(**corruption_nets.PRESETS[preset])


@pytest.fixture(scope="module")
def torch_cae():
    torch.manual_seed(0)
    return TorchCAE()


def images(*size):
    return np.random.default_rng(0).random((2, *size, 3), np.float32)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def imported(tmp_path, network, module, **save):
    torch.save(module.state_dict(), tmp_path / "in.pt", **save)
    import_weights.import_file(network, str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors"))
    return str(tmp_path / "out.safetensors")


# ------------------------------------------------------------------- the same function


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", ["edsr_baseline_x4", "edsr_small"])
def test_an_imported_edsr_is_pytorchs_within_1e_4_of_255(tmp_path, preset, size):
    module, x = torch_edsr(preset), images(*size)
    net = corruption_nets.make(preset, weights=imported(tmp_path, "edsr", module))
    with torch.no_grad():
        expected = nhwc(module(255 * nchw(x)))
    ours = 255 * edsr.edsr_apply(net.theta, jnp.asarray(x))
    np.testing.assert_allclose(ours, expected, atol=1e-4 * 255)


@pytest.mark.parametrize("size", SIZES)
def test_an_imported_cae_is_pytorchs_within_1e_5_for_the_same_bits(tmp_path, torch_cae, size):
    x = images(*size)
    theta = corruption_nets.make("cae", weights=imported(tmp_path, "cae", torch_cae)).theta
    with torch.no_grad():
        latent = nhwc(torch_cae.encode(nchw(x)))
        ours = cae.cae_encode(theta, jnp.asarray(x))
        np.testing.assert_allclose(ours, latent, atol=1e-5)
        bits = np.asarray(cae.binarise(jax.random.key(0), ours))
        expected = nhwc(torch_cae.decode(nchw(bits)))
    np.testing.assert_allclose(cae.cae_decode(theta, bits), expected, atol=1e-5)


# ------------------------------------------------------------------- files


def test_export_and_import_round_trip_bitwise(tmp_path, torch_cae):
    for preset, module in (
        ("cae", torch_cae),
        ("edsr_baseline_x4", torch_edsr("edsr_baseline_x4")),
    ):
        folder = tmp_path / preset
        folder.mkdir()
        ours = imported(folder, preset, module)
        import_weights.export_file(preset, ours, str(folder / "back.pt"))
        back = torch.load(folder / "back.pt", weights_only=True)
        assert set(back) == set(module.state_dict())
        for name, tensor in module.state_dict().items():
            np.testing.assert_array_equal(back[name].numpy(), tensor.numpy(), err_msg=name)
        module.load_state_dict(back)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_of_any_precision_and_kind_give_the_same_float32(tmp_path, dtype, suffix):
    module = torch_edsr("edsr_small").to(dtype)
    source, out = str(tmp_path / f"in.{suffix}"), str(tmp_path / "out.safetensors")
    save = torch.save if suffix == "pt" else safetensors.torch.save_file
    save(dict(module.named_parameters()), source)
    import_weights.import_file("edsr", source, out)  # the mean shift is rounded too
    theta = corruption_nets.make("edsr_small", weights=out).theta
    assert {leaf.dtype for leaf in jax.tree.leaves(theta)} == {jnp.dtype("float32")}
    first = np.asarray(theta["head"]["w"]).transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(first, module.head[0].weight.detach().float().numpy())


def test_old_files_wrapped_dicts_and_prefixes_are_read(tmp_path):
    module = torch_edsr("edsr_small")
    theta = import_weights.from_torch(
        "edsr_small", import_weights.to_torch("edsr_small", _theta(module))
    )
    state = {f"module.{name}": a for name, a in module.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    read = import_weights.from_torch("edsr_small", import_weights.read_torch(tmp_path / "old.pt"))
    jax.tree.map(np.testing.assert_array_equal, read, theta)


def _theta(module):
    state = {name: a.numpy() for name, a in module.state_dict().items()}
    return import_weights.from_torch("edsr_small", state)


class Code:
    def __reduce__(self):
        return os.system, ("touch /tmp/ada_jax_ran_code",)


def damaged(path, kind):
    """Writes a file that must be refused."""
    state = torch_edsr("edsr_small").state_dict()
    if kind == "code":
        path.write_bytes(pickle.dumps({"head.0.weight": Code()}))
    elif kind == "module":
        torch.save(torch_edsr("edsr_small"), path)
    elif kind == "text":
        path.write_text("not a network")
    elif kind == "page":
        path.write_text("<!DOCTYPE html><p>Sign in</p>")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("data.txt", "not a network")
    elif kind == "list":
        torch.save([state["tail.1.bias"]], path)
    else:
        if kind == "nan":
            state["tail.1.bias"][0] = float("nan")
        if kind == "mean":
            state["sub_mean.bias"] += 1
        if kind == "missing":
            del state["body.4.weight"]
        if kind == "more":
            state["body.4.scale"] = torch.zeros(())
        if kind == "number":
            state = {3: torch.zeros(())}
        if kind == "sparse":
            state = {"head.0.weight": torch.eye(3).to_sparse()}
        if kind == "large":
            state["tail.1.bias"] = state["tail.1.bias"].double() + 1e300
        if kind == "shape":
            state["tail.1.bias"] = torch.zeros(4)
        torch.save(state, path)
        if kind == "half":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("code", "more than tensors"),
        ("module", "more than tensors"),
        ("text", r"is neither a PyTorch nor a safetensors file \(it starts with b'not a net'\)"),
        ("page", "starts with b'<!DOCTYPE'.* that it is not an error page"),
        ("empty", "starts with b''"),
        ("folder", "cannot be read .Is a directory"),
        ("zip", "not a complete PyTorch file"),
        ("number", "no state dict of tensors"),
        ("sparse", "no state dict of tensors"),
        ("more", r"has 1 unexpected arrays, body\.4\.scale first"),
        ("large", r"tail\.1\.bias holds NaN or infinity"),
        ("half", "not a complete PyTorch file"),
        ("list", "no state dict"),
        ("nan", r"tail\.1\.bias holds NaN"),
        ("mean", "mean shift"),
        ("missing", r"lacks 1 arrays, body\.4\.weight first"),
        ("shape", r"tail\.1\.bias has the shape \(4,\)"),
    ],
)
def test_bad_files_are_refused_in_a_sentence_and_nothing_is_written(tmp_path, kind, said):
    damaged(tmp_path / "in.pt", kind)
    out = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=said) as error:
        import_weights.import_file("edsr_small", str(tmp_path / "in.pt"), str(out))
    if kind in (
        "nan",
        "mean",
        "missing",
        "more",
        "shape",
    ):  # the right sentence also where the preset is looked for
        with pytest.raises(UserError, match=said):
            import_weights.import_file("edsr", str(tmp_path / "in.pt"), str(out))
    assert "\n" not in str(error.value)
    assert not out.exists() and not os.path.exists("/tmp/ada_jax_ran_code")


def test_what_cannot_be_written_is_told_in_a_sentence(tmp_path):
    ours = imported(tmp_path, "edsr", torch_edsr("edsr_small"))
    (tmp_path / "folder.pt").mkdir()
    for out in (f"{ours}/out.pt", str(tmp_path / "folder.pt")):
        with pytest.raises(UserError, match=r"cannot be written \("):
            import_weights.export_file("edsr_small", ours, out)
    assert sorted(os.listdir(tmp_path)) == ["folder.pt", "in.pt", "out.safetensors"]


def test_a_file_of_another_network_is_refused(tmp_path, torch_cae):
    torch.save(torch_cae.state_dict(), tmp_path / "cae.pt")
    with pytest.raises(UserError, match="not a known EDSR"):
        import_weights.import_file("edsr", str(tmp_path / "cae.pt"), str(tmp_path / "out"))
    with pytest.raises(UserError, match="The file is not edsr_small"):
        import_weights.import_file("edsr_small", str(tmp_path / "cae.pt"), str(tmp_path / "out"))


def test_the_binary(tmp_path):
    source, out = tmp_path / "in.pt", tmp_path / "out.safetensors"
    torch.save(torch_edsr("edsr_small").state_dict(), source)
    done = run_here("import_weights", "edsr", source, out)
    assert done.returncode == 0 and "edsr_small" in done.stdout and out.exists()
    for words, said in (
        (("edsr", source, out), "exists and is not overwritten"),
        (("vdsr", source, tmp_path / "x"), "'vdsr' is unknown"),
        (("edsr", source), "three arguments"),
        (("edsr", tmp_path / "none.pt", tmp_path / "x"), "does not exist"),
    ):
        assert_mistake(run_here("import_weights", *words), said)
