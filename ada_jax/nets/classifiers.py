"""Image classifiers: `residual_nets`, AlexNet and Haiku's ResNet50, with normalisation.

The PreActResNets and the normalisation follow Wong et al., "Fast is better than free" (2020), and
He et al., "Identity mappings in deep residual networks" (2016), with PyTorch's default
initialisation. `preact_resnet18_no_bn` and `_v2` are RobustBench's variants: without the last batch
normalisation, and with shortcuts that project the pre-activated input. `resnet9` is this project's
own, for small machines. `alexnet` is that of Laidlaw et al., "Perceptual adversarial robustness"
(2021), for CIFAR-10, without dropout, and `alexnet_small` has a quarter of its channels. `resnet20`
and `resnet56` are He et al.'s for CIFAR, with option A; `wide_resnet*` Zagoruyko and Komodakis'
(2016); `torchvision_resnet*` torchvision's, whose padding differs from Haiku's. `resnet50` is
Haiku's, of He et al., "Deep residual learning for image recognition" (2016) with the stride in the
3x3 convolution, with Haiku's initialisation and residual branches that start at zero.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import jmp

from ada_jax.errors import UserError
from ada_jax.nets import batch_norm, residual_nets
from ada_jax.nets.residual_nets import Conv, NormRelu, Tap, uniform, uniform_fan_in

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)


def names() -> tuple[str, ...]:
    """The names of the classifiers."""
    return (*_NETWORKS, "resnet50")


def make(
    name: str,
    num_classes: int,
    *,
    mean: tuple[float, ...] = CIFAR10_MEAN,
    std: tuple[float, ...] = CIFAR10_STD,
    bn_decay: float = 0.9,
    bn_axis_name: str | None = None,
    zero_init_logits: bool = False,
    compute_dtype: str = "float32",
) -> hk.TransformedWithState:
    """Makes a classifier that normalises its input images.

    Call `net.init(key, x, is_training=True)` and `net.apply(params, state, rng, x, is_training=...,
    test_local_stats=False)`, which returns `(logits, state)`. Images x are [B, H, W, C] of any
    floating type in [0, 1] and of any size; logits are [B, num_classes] float32. With `is_training`
    batch normalisation uses the batch's statistics and updates the running ones; with only
    `test_local_stats` it uses the batch's without an update; otherwise it uses the running ones.

    `apply` has two more arguments. `perturbations`, {layer: array}, are added to the outputs of
    layers, whose names and shapes `feature_shapes` returns; {layer: function} replaces a layer's
    output by a function of it. The layer 'input' is the normalised images. With `with_features` the
    result is `((logits, features), state)`, where features are the layers' outputs,
    {layer: [B, H', W', C']}.

    Args:
      name: one of `names()`; the module's docstring has their sources.
      num_classes: the number of logits.
      mean: the C channel means for normalisation, in [0, 1].
      std: the C channel standard deviations, positive.
      bn_decay: decay in [0, 1) of the running statistics, which are corrected for zero bias. `init`
        sets them to the statistics of its batch.
      bn_axis_name: the mapped axis that batch statistics are averaged over; None keeps each
        device's own. `init` ignores it and therefore runs outside of `pmap`.
      zero_init_logits: whether to initialise the last layer with zeros.
      compute_dtype: type of the convolutions, 'float32' or 'bfloat16'; parameters, batch
        normalisation and logits are float32.

    Returns:
      The pure functions `init` and `apply`.

    Raises:
      UserError: the name is unknown; from `init` and `apply`, the images are not as above, or a
        perturbation is of an unknown layer.
    """
    if name not in names():
        raise UserError(f"The classifier {name!r} is unknown: choose one of {', '.join(names())}.")

    def forward(
        x: jax.Array,
        is_training: bool,
        test_local_stats: bool = False,
        perturbations: Mapping[str, jax.Array | Callable] | None = None,
        with_features: bool = False,
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        if x.ndim != 4 or x.shape[-1] != len(mean) or not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(
                f"Images of shape {list(x.shape)} and {x.dtype} must be [B,H,W,{len(mean)}], "
                "floating point in [0, 1]: divide integers by 255."
            )
        bn_config = {
            "decay_rate": bn_decay,
            "cross_replica_axis": None if hk.running_init() else bn_axis_name,
        }
        perturbations = perturbations or {}
        tap, outputs = _hooks(perturbations)
        x = x.astype(jnp.float32) - jnp.asarray(mean, jnp.float32)
        x = tap(x / jnp.asarray(std, jnp.float32), "input")
        if name == "resnet50":
            net = _resnet50(num_classes, bn_config, zero_init_logits)
            with _resnet50_policies(compute_dtype), hk.intercept_methods(_resnet50_taps(tap)):
                logits = net(x, is_training, test_local_stats)
        else:
            norm_relu = _norm_relu(bn_config, compute_dtype, is_training, test_local_stats)
            features = _NETWORKS[name](x.astype(compute_dtype), norm_relu, tap)
            features = jnp.mean(features.astype(jnp.float32), axis=(1, 2))
            logits = _logits(features, num_classes, zero_init_logits)
        if unknown := perturbations.keys() - outputs.keys():
            raise UserError(
                f"The layer {min(unknown)!r} is unknown: {name} has {', '.join(outputs)}."
            )
        del outputs["input"]
        return (logits, outputs) if with_features else logits

    return hk.transform_with_state(forward)


def _hooks(perturbations: Mapping[str, jax.Array | Callable]) -> tuple[Tap, dict[str, jax.Array]]:
    """The function that perturbs a layer's output, and the dict in which it keeps the outputs."""
    outputs = {}

    def tap(h: jax.Array, layer: str) -> jax.Array:
        change = perturbations.get(layer)
        if callable(change):
            h = change(h)
        elif change is not None:
            h = h + change.astype(h.dtype)
        outputs[layer] = h
        return h

    return tap, outputs


def _norm_relu(
    bn_config: dict[str, Any], compute_dtype: str, is_training: bool, test_local_stats: bool
) -> NormRelu:
    """Batch normalisation in float32 and a ReLU, for the networks of `residual_nets`."""

    def norm_relu(h: jax.Array, bn_name: str, relu: bool = True) -> jax.Array:
        bn = batch_norm.BatchNorm(
            create_scale=True, create_offset=True, eps=1e-5, name=bn_name, **bn_config
        )
        h = bn(h.astype(jnp.float32), is_training, test_local_stats)
        return (jax.nn.relu(h) if relu else h).astype(compute_dtype)

    return norm_relu


def feature_shapes(
    classifier: hk.TransformedWithState, image_shape: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """The layers whose outputs can be read and perturbed, found without computing anything.

    Args:
      classifier: a classifier of `make`.
      image_shape: [H, W, C].

    Returns:
      {layer: (H', W', C')}, from the first layer to the last: 'stem', 'stage1' and so on, or, of
      AlexNet, 'conv1' to 'conv5'.

    Raises:
      UserError: the classifier names no layers.
    """

    found = {}  # Filled while tracing: a dict that leaves `eval_shape` is sorted by name.

    def trace(x: jax.Array) -> None:
        variables = classifier.init(jax.random.key(0), x, is_training=True)
        (_, features), _ = classifier.apply(
            *variables, None, x, is_training=False, with_features=True
        )
        found.update({layer: output.shape[1:] for layer, output in features.items()})

    jax.eval_shape(trace, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    if not found:
        raise UserError(
            "The classifier names no feature layers, which RLAT and PAT need: call `tap` on the "
            "outputs of its stages in nets/residual_nets.py, or choose another classifier."
        )
    return found


def _logits(features: jax.Array, num_classes: int, zero_init: bool) -> jax.Array:
    inits = _logits_inits(features.shape[-1], zero_init)
    return hk.Linear(num_classes, **inits, name="logits")(features)


def _logits_inits(width: int, zero_init: bool) -> dict[str, hk.initializers.Initializer]:
    zeros = hk.initializers.Constant(0.0)
    w_init = zeros if zero_init else uniform_fan_in
    b_init = zeros if zero_init else uniform(width)
    return {"w_init": w_init, "b_init": b_init}


def _resnet50(num_classes: int, bn_config: dict[str, Any], zero_init_logits: bool) -> hk.Module:
    return hk.nets.ResNet50(
        num_classes,
        bn_config,
        logits_config=_logits_inits(2048, zero_init_logits),
        name="resnet50",
    )


def _resnet50_policies(compute_dtype: str) -> contextlib.ExitStack:
    """Makes Haiku's layers use `compute_dtype` for convolutions only, like the other networks."""
    dtypes = {
        hk.Conv2D: f"params=float32,compute={compute_dtype},output={compute_dtype}",
        hk.BatchNorm: f"params=float32,compute=float32,output={compute_dtype}",
        hk.Linear: "params=float32,compute=float32,output=float32",
    }
    stack = contextlib.ExitStack()
    for layer, policy in dtypes.items():
        stack.enter_context(hk.mixed_precision.push_policy(layer, jmp.get_policy(policy)))
    return stack


def _resnet50_taps(tap: Tap) -> Callable[..., Any]:
    """Names the outputs of Haiku's stem and stages, for `hk.intercept_methods`."""

    def interceptor(method, args, kwargs, context):
        if not isinstance(context.module, hk.nets.ResNet.BlockGroup):
            return method(*args, **kwargs)
        if context.method_name != "__call__":
            return method(*args, **kwargs)
        index = int(context.module.name.removeprefix("block_group_"))
        if index == 0:
            args = (tap(args[0], "stem"), *args[1:])
        return tap(method(*args, **kwargs), f"stage{index + 1}")

    return interceptor


def _alexnet(
    x: jax.Array, norm_relu: NormRelu, tap: Tap, *, widths: tuple[int, ...], hidden: int
) -> jax.Array:
    del norm_relu  # It has no batch normalisation.
    for layer, width in enumerate(widths, start=1):
        conv = Conv(width, 3, stride=2 if layer == 1 else 1, with_bias=True, name=f"conv{layer}")
        x = tap(jax.nn.relu(conv(x)), f"conv{layer}")
        if layer in (1, 2, 5):
            x = _max_pool(x)
    x = _quarters(x.astype(jnp.float32)).reshape(len(x), -1)
    for name in ("hidden1", "hidden2"):
        inits = _logits_inits(x.shape[-1], zero_init=False)
        x = jax.nn.relu(hk.Linear(hidden, **inits, name=name)(x))
    return x[:, None, None]


def _max_pool(x: jax.Array) -> jax.Array:
    """The maximum of each 2x2 pixels; a last odd row or column is its own maximum."""
    batch, height, width, channels = x.shape
    padding = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
    x = jnp.pad(x, padding, constant_values=-jnp.inf)
    # Not `hk.max_pool`, whose gradient is slow on CPUs.
    return x.reshape(batch, -(-height // 2), 2, -(-width // 2), 2, channels).max((2, 4))


def _quarters(x: jax.Array) -> jax.Array:
    """The means [B, 2, 2, C] of the four quarters of features [B, H, W, C], for any size."""
    down, right = -(-x.shape[1] // 2), -(-x.shape[2] // 2)
    rows = [
        jnp.stack([half[:, :, :right].mean((1, 2)), half[:, :, -right:].mean((1, 2))], 1)
        for half in (x[:, :down], x[:, -down:])
    ]
    return jnp.stack(rows, 1)


# Functions of normalised images [B, H, W, C] that return the features [B, H', W', C'] to pool.
_preact = residual_nets.preact_resnet
_preact18 = functools.partial(_preact, widths=(64, 128, 256, 512), depths=(2, 2, 2, 2))
_basic = residual_nets.preact_basic
_basic_v2 = functools.partial(_basic, v2=True)
_NETWORKS: dict[str, Callable[[jax.Array, NormRelu, Tap], jax.Array]] = {
    "preact_resnet20": functools.partial(
        _preact, block=_basic, widths=(16, 32, 64), depths=(3, 3, 3)
    ),
    "alexnet_small": functools.partial(_alexnet, widths=(16, 48, 96, 64, 64), hidden=256),
    "resnet9": residual_nets.resnet9,
    "preact_resnet18": functools.partial(_preact18, block=_basic),
    "preact_resnet18_no_bn": functools.partial(_preact18, block=_basic, last_norm=False),
    "preact_resnet18_v2": functools.partial(_preact18, block=_basic_v2),
    "alexnet": functools.partial(_alexnet, widths=(64, 192, 384, 256, 256), hidden=4096),
    "preact_resnet50": functools.partial(
        _preact,
        block=residual_nets.preact_bottleneck,
        widths=(64, 128, 256, 512),
        depths=(3, 4, 6, 3),
    ),
    "resnet20": functools.partial(residual_nets.cifar_resnet, depth=20),
    "resnet56": functools.partial(residual_nets.cifar_resnet, depth=56),
    "wide_resnet40_2": functools.partial(residual_nets.wide_resnet, depth=40, factor=2),
    "wide_resnet28_4": functools.partial(residual_nets.wide_resnet, depth=28, factor=4),
    "wide_resnet28_10": functools.partial(residual_nets.wide_resnet, depth=28, factor=10),
    "torchvision_resnet18": functools.partial(
        residual_nets.imagenet_resnet, block=residual_nets.imagenet_basic, depths=(2, 2, 2, 2)
    ),
    "torchvision_resnet50": functools.partial(
        residual_nets.imagenet_resnet, block=residual_nets.imagenet_bottleneck, depths=(3, 4, 6, 3)
    ),
}
