"""LPIPS, Fast-LPA and RLAT's perturbations beside a statement of each in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ada_jax import attacks, losses, perceptual
from ada_jax.attacks import rlat
from ada_jax.nets import classifiers
from tests.test_classifiers import fitted

torch = pytest.importorskip("torch")
F = torch.nn.functional

BATCH, SIZE = 6, 16


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Smooth random images, and labels."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0.1, 0.9, (BATCH, SIZE // 4, SIZE // 4, 3))
    return np.float32(coarse.repeat(4, 1).repeat(4, 2)), rng.integers(0, 10, BATCH)


def torch_of(a: np.ndarray) -> torch.Tensor:
    """Images [B,H,W,C] or a kernel [h,w,I,O] in PyTorch's layout."""
    a = torch.tensor(np.asarray(a), dtype=torch.float32)
    return a.permute(3, 2, 0, 1) if a.shape[0] in (1, 3) else a.permute(0, 3, 1, 2)


class ResNet9:
    """The classifier resnet9, stated in PyTorch."""

    def __init__(self):
        _, self.params, self.state = fitted("resnet9")

    def conv(self, x, name, stride=1):
        return F.conv2d(x, torch_of(self.params[name]["w"]), stride=stride, padding=1)

    def norm_relu(self, x, name, training):
        p = {k: torch.tensor(np.asarray(v)).reshape(-1) for k, v in self.params[name].items()}
        mean, var = (
            torch.tensor(np.asarray(self.state[f"{name}/~/{e}"]["average"])).reshape(-1)
            for e in ("mean_ema", "var_ema")
        )
        return F.relu(F.batch_norm(x, mean, var, p["scale"], p["offset"], training, eps=1e-5))

    def __call__(self, x, deltas=None, training=False):
        deltas, features = deltas or {}, []
        shift = lambda x, layer: x + deltas.get(layer, 0)  # noqa: E731
        mean, std = (
            torch.tensor(v)[:, None, None]
            for v in (classifiers.CIFAR10_MEAN, classifiers.CIFAR10_STD)
        )
        x = self.norm_relu(self.conv((x - mean) / std, "stem"), "stem_bn", training)
        x = shift(x, "stem")
        for stage in ("stage1", "stage2", "stage3"):
            x = self.norm_relu(self.conv(x, f"{stage}/down", 2), f"{stage}/down_bn", training)
            h = self.norm_relu(self.conv(x, f"{stage}/conv1"), f"{stage}/bn1", training)
            x = x + self.norm_relu(self.conv(h, f"{stage}/conv2"), f"{stage}/bn2", training)
            x = shift(x, stage)
            features.append(x)
        logits = self.params["logits"]
        w, b = (torch.tensor(np.asarray(logits[k])) for k in ("w", "b"))
        return x.mean((2, 3)) @ w + b, features


def phi(features):
    """The vectors whose Euclidean distance is LPIPS."""
    units = [f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in features]
    return torch.cat([u.flatten(1) / (u.shape[2] * u.shape[3]) ** 0.5 for u in units], 1)


def as_numpy(x):
    """Images in this project's layout."""
    return x.detach().permute(0, 2, 3, 1).numpy()


def test_lpips():
    x, _ = batch()
    other = np.clip(x + np.random.default_rng(1).normal(0, 0.1, x.shape), 0, 1).astype(np.float32)
    model = jax.jit(perceptual.model_of(*fitted("resnet9")))
    ours = perceptual.lpips(lambda images: model(images)[1], x, other)
    net = ResNet9()
    theirs = (phi(net(torch_of(x))[1]) - phi(net(torch_of(other))[1])).norm(dim=1)
    np.testing.assert_allclose(model(x)[0], net(torch_of(x))[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4)
    assert ours.min() > 0.1


def fast_lpa(net, x, y, delta, bound, steps=10):
    reference = phi(net(x)[1]).detach()
    for i in range(steps):
        weight, length = 10 * 0.1 ** (1 - i / steps), 0.5 * 0.1 ** (i / steps)
        delta = delta.detach().requires_grad_()
        logits, features = net(x + delta)
        wrong = logits.scatter(1, y[:, None], -torch.inf).max(1).values
        margin = wrong - logits.gather(1, y[:, None])[:, 0]
        moved = phi(features)
        excess = F.relu((moved - reference).norm(dim=1) - bound)
        (g,) = torch.autograd.grad((-margin + weight * excess).sum(), delta)
        g = g / (g.flatten(1).norm(dim=1) + 1e-8)[:, None, None, None]
        speed = (moved - phi(net(x + delta - 0.1 * g)[1])).norm(dim=1) / 0.1
        delta = (x + delta - g * (length / (speed + 1e-4))[:, None, None, None]).clip(0, 1) - x
    return x + delta


@pytest.mark.parametrize("bound", [0.5, 0.1])
def test_fast_lpa(bound):
    x, _ = batch()
    net, model = ResNet9(), perceptual.model_of(*fitted("resnet9"))
    y = np.array(jnp.argmax(model(x)[0], -1))
    y[0] = (y[0] + 1) % 10  # Misclassified: it is not attacked.
    keys = jax.random.split(jax.random.key(0), BATCH)
    attack = jax.jit(lambda keys, x, y: attacks.fast_lpa(keys, model, x, y, bound))
    ours, info = attack(keys, x, y)
    noise = 0.01 * jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
    theirs = fast_lpa(net, torch_of(x), torch.tensor(y), torch_of(np.asarray(noise)), bound)
    np.testing.assert_array_equal(ours[0], x[0])
    np.testing.assert_allclose(ours[1:], as_numpy(theirs)[1:], atol=1e-4)
    moved = (phi(net(theirs)[1]) - phi(net(torch_of(x))[1])).norm(dim=1)
    np.testing.assert_allclose(info["distance"][1:], moved.detach()[1:], rtol=1e-3)
    assert info["distance"][1:].min() > 0.05


def test_rlat():
    x, y = batch()
    net, params, state = fitted("resnet9")
    layers = classifiers.feature_shapes(net, x.shape[1:])

    def loss_fn(images, deltas):
        logits, _ = net.apply(params, state, None, images, is_training=True, perturbations=deltas)
        return losses.cross_entropy(logits, y)

    images, deltas, _ = jax.jit(lambda x: rlat.perturb(loss_fn, x, layers, 0.08))(x)
    zeros = {k: torch.zeros(BATCH, s[2], *s[:2], requires_grad=True) for k, s in layers.items()}
    inputs = torch_of(x).requires_grad_()
    loss = F.cross_entropy(ResNet9()(inputs, zeros, training=True)[0], torch.tensor(y))
    gradients = torch.autograd.grad(loss, [inputs, *zeros.values()])
    moves = []
    for i, g in enumerate(gradients):
        radius = 0.08 * g[0].numel() / gradients[0][0].numel() / (i + 1)
        moves.append(radius * g / g.flatten(1).norm(dim=1)[:, None, None, None])
    np.testing.assert_allclose(images, as_numpy((inputs + moves[0]).clip(0, 1)), atol=1e-4)
    for layer, move in zip(layers, moves[1:], strict=True):
        np.testing.assert_allclose(deltas[layer], as_numpy(move), atol=1e-4)
        assert np.abs(deltas[layer]).max() > 1e-3


def test_alexnet():
    x = np.float32(np.random.default_rng(0).uniform(0, 1, (2, 32, 32, 3)))
    net, params, state = fitted("alexnet_small")
    p = {k: {n: torch.tensor(np.asarray(a)) for n, a in v.items()} for k, v in params.items()}
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (classifiers.CIFAR10_MEAN, classifiers.CIFAR10_STD)
    )
    h, features = (torch_of(x) - mean) / std, []
    for i in range(1, 6):
        conv = p[f"conv{i}"]
        w = conv["w"].permute(3, 2, 0, 1)
        h = F.relu(F.conv2d(h, w, conv["b"], stride=2 if i == 1 else 1, padding=1))
        features.append(h)
        h = F.max_pool2d(h, 2) if i in (1, 2, 5) else h
    h = h.permute(0, 2, 3, 1).flatten(1)
    for name in ("hidden1", "hidden2"):
        h = F.relu(h @ p[name]["w"] + p[name]["b"])
    logits, ours = jax.jit(perceptual.model_of(net, params, state))(x)
    np.testing.assert_allclose(logits, h @ p["logits"]["w"] + p["logits"]["b"], atol=1e-5)
    for i, feature in enumerate(features, start=1):
        np.testing.assert_allclose(ours[f"conv{i}"], as_numpy(feature), atol=1e-5)
