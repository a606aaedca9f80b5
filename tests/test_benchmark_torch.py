"""Tests of PyTorch's side of the benchmark: it does the same work as the package."""

import functools
import math
from collections.abc import Iterator

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ada_jax import ada, losses
from ada_jax.nets import classifiers, corruption_nets, edsr

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[torch]'")

from ada_jax import benchmark_torch as peer  # noqa: E402

SMALL = {"blocks": 2, "features": 4, "scale": 1}
EXAMPLES = 3


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Beside other programs, threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def as_torch(leaf: jax.typing.ArrayLike) -> torch.Tensor:
    """PyTorch's order of axes: [...,h,w,C,O] to [...,O,C,h,w]; biases and delta's stay."""
    a = np.asarray(leaf)
    if a.ndim >= 4:
        a = np.moveaxis(a, (-1, -2), (-4, -3))
    return torch.from_numpy(a.copy())


def tree(theta: dict) -> peer.Theta:
    # In one order: what comes out of jax.jit is sorted, what goes in need not be.
    return {name: (as_torch(p["w"]), as_torch(p["b"])) for name, p in sorted(theta.items())}


def images_to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


@functools.cache
def problem() -> tuple:
    """A small network, perturbations of a twentieth of its leaves' norms, images and labels."""
    # NumPy's numbers: JAX would compile a program for each leaf.
    rng = np.random.default_rng(0)
    architecture = edsr.edsr(**SMALL)
    shapes = jax.eval_shape(architecture.init, jax.random.key(0))
    theta = jax.tree.map(lambda a: rng.uniform(-0.2, 0.2, a.shape).astype(np.float32), shapes)

    def perturb(leaf):
        d = rng.normal(size=(EXAMPLES, *leaf.shape)).astype(np.float32)
        return d * np.float32(0.05 * np.linalg.norm(leaf) / leaf.size**0.5)

    net = ada.CorruptionNet(architecture.apply, theta)
    delta = jax.tree.map(perturb, theta)
    keys = jax.random.split(jax.random.key(1), EXAMPLES)
    x = rng.uniform(size=(EXAMPLES, 16, 16, 3)).astype(np.float32)
    return net, keys, delta, x, np.array([3, 1, 4])


def distance(got: peer.Theta, expected: peer.Theta) -> float:
    """Norm of the difference relative to the norm."""
    got, expected = (torch.cat([a.flatten() for a in peer._leaves(t)]) for t in (got, expected))
    return float((got - expected).norm() / expected.norm())


def test_every_example_goes_through_its_own_edsr() -> None:
    net, keys, delta, x, _ = problem()
    expected = jax.jit(functools.partial(ada.render, net))(delta, x, keys)
    got = peer.render(tree(net.theta), tree(delta), images_to_torch(x))
    np.testing.assert_allclose(got, np.moveaxis(expected, -1, 1), atol=1e-5)
    unperturbed = tree(jax.tree.map(np.zeros_like, delta))
    assert (got - peer.render(tree(net.theta), unperturbed, images_to_torch(x))).abs().max() > 1e-3


def test_gradient_to_delta() -> None:
    net, keys, delta, x, _ = problem()
    weights = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def f(delta):
        return jnp.sum(weights * ada.render(net, delta, x, keys))

    expected = tree(jax.jit(jax.grad(f))(delta))
    ours = tree(delta)
    variables = [leaf.requires_grad_() for leaf in peer._leaves(ours)]
    rendered = peer.render(tree(net.theta), ours, images_to_torch(x))
    gradient = torch.autograd.grad((images_to_torch(weights) * rendered).sum(), variables)
    assert distance(peer._tree(ours, gradient), expected) < 1e-4


def test_maximise_ascends_as_ours_from_the_same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    net, keys, delta, x, y = problem()
    scale = 0.05  # So small that some leaves end inside of their balls.
    monkeypatch.setattr(ada.perturbation, "init", lambda *_: delta)
    monkeypatch.setattr(peer, "random_start", lambda *_: peer._leaves(tree(delta)))
    w = np.random.default_rng(0).normal(size=(*x.shape[1:], 5)).astype(np.float32) / 10
    w_torch = torch.from_numpy(np.moveaxis(w, 2, 0).reshape(-1, 5).copy())

    def attack(x, y):
        def loss_fn(images):
            return losses.cross_entropy(jnp.einsum("bhwc,hwck->bk", images, w), y)

        return ada.maximise(keys, x, loss_fn, net, nu=0.1, steps=3, step_scale=scale)[0]

    expected = tree(jax.jit(attack)(x, y))
    got = peer.maximise(
        images_to_torch(x),
        torch.from_numpy(y),
        tree(net.theta),
        lambda images: images.flatten(1) @ w_torch,
        steps=3,
        nu=0.1,
        step_scale=scale,
    )
    # A gradient of about zero may have either sign.
    assert distance(got, expected) < 1e-2 < 0.1 < distance(tree(delta), expected)


def test_random_start_fills_the_balls() -> None:
    leaves = [torch.ones(4, 2, 3, 3), torch.ones(2)]
    radii = torch.tensor([0.5, 2.0])
    delta = peer.random_start(2000, leaves, radii)
    for d, leaf, radius in zip(delta, leaves, radii, strict=True):
        assert d.shape == (2000, *leaf.shape)
        # The share of the ball's volume that is nearer to the centre is uniform.
        volumes = (d.flatten(1).norm(dim=1) / radius) ** leaf.numel()
        assert volumes.max() < 1.0001
        np.testing.assert_allclose(np.quantile(volumes, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], 0.15)


def test_preact_resnet18_equals_ours_with_the_batch_s_statistics() -> None:
    net = classifiers.make("preact_resnet18", 10)
    x = problem()[3]
    init = functools.partial(net.init, is_training=True)
    params, state = jax.eval_shape(init, jax.random.key(0), x)
    model = peer.PreActResNet18(local_stats=True).eval()
    assert sum(p.numel() for p in model.parameters()) == hk.data_structures.tree_size(params)
    rng = np.random.default_rng(0)
    params = {
        module: {
            name: rng.uniform(-0.05, 0.1, shape.shape).astype(np.float32)
            for name, shape in leaves.items()
        }
        for module, leaves in params.items()
    }
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), state)
    apply = jax.jit(functools.partial(net.apply, is_training=False, test_local_stats=True))
    expected, _ = apply(params, state, None, x)
    model.load_state_dict(state_dict(params))
    model = model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        logits = model(images_to_torch(x))
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def state_dict(params: hk.Params) -> dict[str, torch.Tensor]:
    """Haiku's parameters of a classifier under PyTorch's names."""
    named = {}
    for module, leaves in params.items():
        prefix = f"blocks.{module.replace('/', '.')}" if "/" in module else module
        for name, leaf in leaves.items():
            suffix = {"w": "weight", "scale": "weight", "b": "bias", "offset": "bias"}[name]
            a = as_torch(leaf.reshape(-1) if name in ("scale", "offset") else leaf)
            named[f"{prefix}.{suffix}"] = a.T if a.ndim == 2 else a
    return named


@pytest.fixture
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has rows measured with images of 8x8."""
    monkeypatch.setattr(peer, "_batch", lambda n, _: (torch.rand(n, 3, 8, 8), torch.arange(n) % 10))


@pytest.mark.usefixtures("small_images")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setitem(corruption_nets.PRESETS, "edsr_baseline", SMALL)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    inner = list(peer.inner_rows(2, dtype, steps=2, seconds=0))
    step = list(peer.step_rows(2, dtype, seconds=0))
    for rows, unit in ((inner, " example-steps/s"), (step, " examples/s")):
        assert [row[0].split(", ")[0] for row in rows] == ["PyTorch eager", "PyTorch torch.compile"]
        assert all(row[0].endswith("preact_resnet18, batch 2") for row in rows)
        assert all(math.isfinite(row[1]) and row[2].endswith(unit) for row in rows)


@pytest.mark.usefixtures("small_images")
def test_a_form_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(f, **_):
        raise RuntimeError("no C++ compiler\nset CXX")

    monkeypatch.setattr(torch, "compile", no_compiler)
    eager, compiled = peer.step_rows(2, "float32", seconds=0)
    assert math.isfinite(eager[1])
    assert math.isnan(compiled[1]) and compiled[2] == "no C++ compiler"
