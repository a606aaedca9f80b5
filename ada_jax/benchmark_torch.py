"""The PyTorch rows of `python -m ada_jax.benchmark --peer=torch`."""

import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ada_jax.nets import classifiers, corruption_nets, edsr

Theta = dict[str, tuple[Tensor, Tensor]]  # Convolution: (kernel [O,C,3,3], bias [O]).
Row = tuple[str, float, str, float]  # Title, seconds per call, rate, seconds of the first call.
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]  # torch.compile or the identity.

_MEAN = edsr.DIV2K_MEAN.tolist()
_TINY = 1e-30


# ------------------------------------------------------------------------------- EDSR


def edsr_init(blocks: int, features: int, device: str = "cpu") -> Theta:
    """Random parameters of an EDSR of scale 1, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), float32."""
    widths = {"head": (3, features)}
    for i in range(blocks):
        widths[f"block{i:02d}/conv0"] = widths[f"block{i:02d}/conv1"] = (features, features)
    widths |= {"body_end": (features, features), "tail": (features, 3)}
    convolutions = {name: nn.Conv2d(*w, 3, device=device) for name, w in widths.items()}
    return {name: (c.weight.detach(), c.bias.detach()) for name, c in convolutions.items()}


def edsr(theta: Theta, delta: Theta, images: Tensor) -> Tensor:
    """EDSR of scale 1 with separate parameters for every image, as grouped convolutions.

    Args:
      theta: the shared parameters.
      delta: the perturbation of each example, with a leading axis [B].
      images: [B,3,H,W] in [0,1].

    Returns:
      Images [B,3,H,W] near [0,1], not clipped.
    """

    def conv(name: str, h: Tensor) -> Tensor:
        (w, b), (dw, db) = theta[name], delta[name]
        w = (w + dw).flatten(0, 1)
        # Flattened before the sum: torch.compile on a CPU fails if a bias is a view of a sum.
        b = b.repeat(len(images)) + db.flatten()
        return F.conv2d(h, w, b, padding=1, groups=len(images))

    # Created on the device: a copy from the host would synchronise.
    mean = torch.cat([images.new_full((1, 1, 1), value) for value in _MEAN])
    x = h = conv("head", (255 * (images - mean)).reshape(1, -1, *images.shape[2:]))
    for i in range(sum(name.endswith("/conv0") for name in theta)):
        h = h + conv(f"block{i:02d}/conv1", F.relu(conv(f"block{i:02d}/conv0", h)))
    return conv("tail", x + conv("body_end", h)).reshape(images.shape) / 255 + mean


def render(theta: Theta, delta: Theta, images: Tensor) -> Tensor:
    """The output of `edsr` as float32, clipped to [0,1]."""
    return edsr(theta, delta, images).float().clamp(0.0, 1.0)


# ------------------------------------------------------------------------- classifier


class PreActResNet18(nn.Module):
    """The preact_resnet18 of `ada_jax.nets.classifiers`, which normalises its input."""

    def __init__(self, num_classes: int = 10, local_stats: bool = False) -> None:
        """Initialises the parameters at random.

        Args:
          num_classes: number of logits.
          local_stats: whether batch normalisation uses the batch's statistics in eval mode, too.
        """
        super().__init__()
        norm = functools.partial(nn.BatchNorm2d, track_running_stats=not local_stats)
        for name in ("mean", "std"):
            values = getattr(classifiers, f"CIFAR10_{name.upper()}")
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.stem = _conv(3, 64, 3)
        self.blocks, inputs = nn.ModuleDict(), 64
        for stage, width in enumerate((64, 128, 256, 512), start=1):
            for i in (1, 2):
                stride = 2 if stage > 1 and i == 1 else 1
                self.blocks[f"stage{stage}_block{i}"] = _Block(inputs, width, stride, norm)
                inputs = width
        self.bn = norm(inputs)
        self.logits = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B,3,H,W] in [0,1] to logits [B,num_classes]."""
        x = self.stem((x - self.mean) / self.std)
        for block in self.blocks.values():
            x = block(x)
        return self.logits(F.relu(self.bn(x)).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.bn1, self.conv1 = norm(inputs), _conv(inputs, width, 3, stride)
        self.bn2, self.conv2 = norm(width), _conv(width, width, 3)
        same = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if same else _conv(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(h))) + self.shortcut(x)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


# ------------------------------------------------------------------ inner maximisation


def maximise(
    x: Tensor,
    y: Tensor,
    theta: Theta,
    classifier: Callable[[Tensor], Tensor],
    steps: int,
    nu: float,
    step_scale: float = 0.25,
    *,
    dtype: str = "float32",
    wrap: Wrap = lambda f: f,
) -> Theta:
    """Projected sign-gradient ascent on delta from a random start, like `ada_jax.ada.maximise`.

    Args:
      x: images [B,3,H,W] in [0,1], float32.
      y: labels [B], int64.
      theta: EDSR's parameters, float32.
      classifier: images to logits [B,K]. A `PreActResNet18` should be in eval mode with
        `local_stats`, and its parameters should not require gradients.
      steps: number of steps.
      nu: radius of every leaf's ball relative to the leaf's norm.
      step_scale: step in units of the median radius.
      dtype: 'bfloat16' runs the forward pass under autocast; delta is float32.
      wrap: cached `torch.compile`, or the identity.

    Returns:
      delta inside its balls, with a leading axis [B], float32.
    """
    loss_fn, ascend = wrap(_total_loss), wrap(_ascend)
    leaves = _leaves(theta)
    radii = nu * torch.stack([torch.linalg.vector_norm(leaf) for leaf in leaves])
    # Unlike torch.median, torch.quantile averages the two middle values.
    eta = step_scale * torch.quantile(radii, 0.5)
    delta = random_start(len(x), leaves, radii)
    for _ in range(steps):
        variables = [d.detach().requires_grad_() for d in delta]
        with _autocast(x.device.type, dtype):
            loss = loss_fn(variables, x, y, theta, classifier)
        ascend(delta, torch.autograd.grad(loss, variables), radii, eta)
    return _tree(theta, delta)


def random_start(batch: int, leaves: list[Tensor], radii: Tensor) -> list[Tensor]:
    """Draws delta uniformly from the product of balls, a tensor [B, *leaf.shape] for every leaf."""
    delta = []
    for leaf, radius in zip(leaves, radii, strict=True):
        d = torch.randn(batch, *leaf.shape, device=leaf.device)
        # U^(1/d) is distributed like the distance from the centre of a uniform point in a d-ball.
        distances = radius * torch.rand(batch, device=leaf.device) ** (1 / leaf.numel())
        delta.append(d.mul_(_along(distances / _norms(d), d)))
    return delta


def _total_loss(
    leaves: list[Tensor],
    x: Tensor,
    y: Tensor,
    theta: Theta,
    classifier: Callable[[Tensor], Tensor],
) -> Tensor:
    # A sum, not a mean, makes an example's gradient independent of the batch size.
    logits = classifier(render(theta, _tree(theta, leaves), x))
    return F.cross_entropy(logits, y, reduction="sum")


def _ascend(delta: list[Tensor], gradient: Sequence[Tensor], radii: Tensor, eta: Tensor) -> None:
    """Takes a sign step and projects, in place."""
    for d, g, radius in zip(delta, gradient, radii, strict=True):
        d.add_(eta * g.sign())
        d.mul_(_along((radius / _norms(d)).clamp_max(1.0), d))


def _norms(d: Tensor) -> Tensor:
    return torch.linalg.vector_norm(d.flatten(1), dim=1).clamp_min(_TINY)


def _along(scalars: Tensor, leaf: Tensor) -> Tensor:
    return scalars.view(-1, *[1] * (leaf.ndim - 1))


def _leaves(theta: Theta) -> list[Tensor]:
    return [leaf for pair in theta.values() for leaf in pair]


def _tree(theta: Theta, leaves: list[Tensor]) -> Theta:
    return dict(zip(theta, zip(leaves[::2], leaves[1::2], strict=True), strict=True))


# ------------------------------------------------------------------------------- rows


def inner_rows(batch: int, dtype: str, steps: int = 5, seconds: float = 3.0) -> Iterator[Row]:
    """Inner maximisation, edsr_baseline + preact_resnet18, eager and compiled.

    Args:
      batch: examples attacked at a time.
      dtype: 'float32' (TF32 on a GPU) or 'bfloat16' (autocast).
      steps: steps of ascent.
      seconds: how long to repeat each.

    Yields:
      Title, least seconds per call, example-steps per second as text, seconds of the first call.
      If it fails, the seconds are NaN and the rate is the first line of the error.
    """
    title = f"inner maximisation, edsr_baseline + preact_resnet18, batch {batch}"
    prepare = functools.partial(_prepare_attack, batch, dtype, steps)
    yield from _rows(prepare, title, batch * steps, "example-steps/s", seconds)


def step_rows(batch: int, dtype: str, seconds: float = 3.0) -> Iterator[Row]:
    """The nominal training step of preact_resnet18, eager and compiled; see `inner_rows`."""
    title = f"training step, nominal, preact_resnet18, batch {batch}"
    prepare = functools.partial(_prepare_training, batch, dtype)
    yield from _rows(prepare, title, batch, "examples/s", seconds)


def _rows(
    prepare: Callable[[Wrap], Callable[[], Any]],
    title: str,
    work: int,
    unit: str,
    seconds: float,
) -> Iterator[Row]:
    """Rows for the function that `prepare` returns, which does `work` units per call."""
    compiler = functools.partial(torch.compile, dynamic=False)
    for form, wrap in (("eager", lambda f: f), ("torch.compile", functools.cache(compiler))):
        try:
            least, first = _measure(prepare(wrap), seconds)
            rate = f"{work / least:.0f} {unit}"
        except Exception as error:  # The other rows are still measured.
            least = first = math.nan
            rate = (str(error).strip() or repr(error)).splitlines()[0]
        _free()
        yield f"PyTorch {form}, {title}", least, rate, first


def _prepare_attack(batch: int, dtype: str, steps: int, wrap: Wrap) -> Callable[[], Any]:
    device = _set_up()
    preset = corruption_nets.PRESETS["edsr_baseline"]
    theta = edsr_init(preset["blocks"], preset["features"], device)
    classifier = PreActResNet18(local_stats=True).eval().requires_grad_(False)
    classifier = classifier.to(device, memory_format=torch.channels_last)
    x, y = _batch(batch, device)
    return lambda: maximise(x, y, theta, classifier, steps, nu=0.015, dtype=dtype, wrap=wrap)


def _prepare_training(batch: int, dtype: str, wrap: Wrap) -> Callable[[], Any]:
    device = _set_up()
    model = PreActResNet18().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
    )
    x, y = _batch(batch, device)
    x = x.contiguous(memory_format=torch.channels_last)
    loss_fn = wrap(_mean_loss)

    def step() -> None:
        optimizer.zero_grad()
        with _autocast(device, dtype):
            loss = loss_fn(model, x, y)
        loss.backward()
        optimizer.step()

    return step


def _mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def _set_up() -> str:
    """Selects the device and enables its fastest kernels."""
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        return "cpu"
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    return "cuda"


def _batch(batch: int, device: str) -> tuple[Tensor, Tensor]:
    images = torch.rand(batch, 3, 32, 32, device=device)
    return images, torch.arange(batch, device=device) % 10


def _autocast(device: str, dtype: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")


def _measure(f: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Least seconds per call, and the seconds of the first call, which compiles."""
    first = _timed(f)
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        times.append(_timed(f))
    return min(times), first


def _timed(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _free() -> None:
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
