"""AdversarialAugment: per-example adversarial perturbations of a corruption network's weights.

Source: Calian et al., "Defending Against Image Corruptions Through Adversarial Augmentations".
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ada_jax import checks, keys, losses, perturbation, sharding, ssim
from ada_jax.errors import UserError, first_line


class CorruptionNet(NamedTuple):
    """An image-to-image network c_theta.

    Attributes:
      apply: `apply(theta, x, key) -> [B,H,W,C]`, x [B,H,W,C] in [0,1], output near [0,1] but not
        clipped; deterministic networks ignore the key. AdA calls it under `jax.vmap` over theta,
        with the images that share a perturbation, one by default.
      theta: parameters, a tree of arrays, all of which are converted to float32 and perturbed.
    """

    apply: Callable[..., jax.Array]
    theta: Any


CHOICES = ("delta", "mixing")
PyTree = object
LogitsFn = Callable[[jax.Array], jax.Array]


def adversarial_augment(
    key: jax.Array,
    x: jax.Array,
    y: jax.Array,
    *,
    logits_fn: LogitsFn,
    net: CorruptionNet,
    nu: jax.Array | float = 0.015,
    steps: int = 10,
    step_rule: str = "sign",
    step_scale: jax.Array | float = 0.25,
    ssim_threshold: jax.Array | float = 0.3,
    root_rule: str = "in_range",
    microbatch: int | None = None,
    group: int = 1,
    leaves: str = "",
    choice: str = "delta",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Corrupts every image so that the classifier's loss on it is as large as possible.

    Call it inside `jax.jit`: outside of it every call compiles again. `nu`, `step_scale` and
    `ssim_threshold` may be traced; the other settings may not.

    The batch may be split over several devices, either by `jax.jit` along the automatic or explicit
    axes of the mesh of `jax.set_mesh`, or inside `jax.shard_map`, where `microbatch` and `group`
    count a device's own examples. A single key, equal on all devices, is split over the whole
    batch, as on one device. Pass one key per example in `jax.pmap`, with `check_vma=False`, or if
    the batch's axes are not in the mesh's order: a device does not know its position there.

    Args:
      key: random key, or one per example [B].
      x: images [B,H,W,C] of any floating type, in [0,1]; all computation is in float32.
      y: labels [B], int.
      logits_fn: the classifier, a function of any framework that is closed over its parameters,
        [b,H,W,C] float32 -> [b,K] of any floating type.
      net: the corruption network, `ada_jax.make_corruption_net(name)` or your own.
      nu: radius of every leaf's ball relative to the leaf's norm.
      steps: steps of gradient ascent; 0 returns the random start, for comparison.
      step_rule: 'sign' (the paper's) or 'l2' (per leaf).
      step_scale: step in units of the median radius ('sign') or of the leaf's own radius ('l2').
      ssim_threshold: images whose SSIM to x is lower are moved back to about this value. -1
        disables the search; images smaller than SSIM's window of 11x11 pixels need it.
      root_rule: 'in_range', 'interpolated' or 'paper', see `ada_jax.ssim.line_search`.
      microbatch: number n of examples attacked at a time, a divisor of B; bounds memory.
        Microbatch i has the groups i, i + B/n, ... The result does not depend on n unless logits_fn
        mixes examples (batch-statistics batch norm).
      group: number of consecutive examples that share one delta, a divisor of the microbatch or of
        B. The ascent maximises the sum of their losses. Above 1 this approximates AdA by a weaker
        attack; the whole batch is one environment of IRM (paper, equations 4 and 5).
      leaves: regular expression; only leaves of theta whose path, such as 'block00/conv0/w',
        contains a match are perturbed. '' means all, 'b$' the biases, '^tail/' the last layer and
        '^block' the residual blocks of EDSR. The median radius is that of these leaves.
      choice: what the ascent chooses, 'delta' (the paper's) or 'mixing' (AdvMix), see `maximise`.

    Returns:
      The augmented images [B,H,W,C], float32 in [0,1], with gradients stopped, and metrics [B]:
      'loss_start' (random start), 'loss_end' (after the ascent), 'ssim_before' and 'ssim_after'
      (the line search), 'changed' (1 if the line search moved the image, else 0) and 'on_surface'
      (share of perturbed leaves on their ball's surface). Images smaller than 11x11 have no SSIMs.

    Raises:
      UserError: an argument is invalid, such as an image or a label out of range, a network that
        changes the image shape, or a microbatch that does not divide B. Inside `jax.jit` values
        cannot be checked; images that are out of range, or whose label is, become NaN instead.
    """
    x, y = checks.as_images(jnp.asarray(x)), jnp.asarray(y)
    check_settings(nu, steps, step_rule, step_scale, ssim_threshold, root_rule)
    _check(net, x, ssim_threshold, microbatch, group)
    if choice not in CHOICES:
        raise UserError(f"choice={choice!r} is unknown: choose one of {', '.join(CHOICES)}.")
    classes = checks.check_labels(y, x, logits_fn, microbatch)
    spec = checks.microbatch_spec(x, microbatch)
    logits_fn = checks.float32_logits(logits_fn, spec, gradients=steps != 0)
    net = net._replace(theta=jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), net.theta))
    x, y = checks.nan_if_invalid(x, y, classes), y.astype(jnp.int32)
    # With one key per example, draws depend neither on the rest of the batch nor on `microbatch`.
    example_keys = keys.of_batch(key, x)
    static = _Static(net.apply, steps, step_rule, root_rule, group, leaves, choice)
    attack = functools.partial(_attack, static)
    if microbatch and microbatch < len(x):
        attack = _in_microbatches(attack, len(x) // microbatch, group)
    numbers = {"nu": nu, "step_scale": step_scale, "ssim_threshold": ssim_threshold}
    return sharding.on_mesh(attack, logits_fn, x)(x, y, example_keys, net.theta, numbers)


class _Static(NamedTuple):
    """The options of the attack that are not arrays; see `adversarial_augment`."""

    apply: Callable[..., jax.Array]
    steps: int
    step_rule: str
    root_rule: str
    group: int
    leaves: str
    choice: str


def _attack(
    static: _Static,
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    example_keys: jax.Array,
    theta: PyTree,
    numbers: dict[str, jax.Array | float],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`adversarial_augment` with checked arguments."""
    net = restricted(CorruptionNet(static.apply, theta), static.leaves)
    net, x = net._replace(theta=lax.stop_gradient(net.theta)), lax.stop_gradient(x)
    loss_fn = lambda images: losses.cross_entropy(logits_fn(images), y)  # noqa: E731
    delta, metrics = maximise(
        example_keys,
        x,
        loss_fn,
        net,
        nu=numbers["nu"],
        steps=static.steps,
        step_rule=static.step_rule,
        step_scale=numbers["step_scale"],
        group=static.group,
        choice=static.choice,
    )
    images = render(net, delta, x, example_keys)
    metrics["loss_end"] = loss_fn(images)
    metrics["loss_start"] = metrics["loss_start"] if static.steps else metrics["loss_end"]
    if not ssim.fits(x):
        metrics["changed"] = jnp.zeros_like(metrics["loss_end"])
        return lax.stop_gradient((images, metrics))
    images, search = ssim.line_search(x, images, numbers["ssim_threshold"], static.root_rule)
    metrics |= {"changed": search["changed"], "ssim_before": search["ssim_before"]}
    metrics["ssim_after"] = ssim.ssim(x, images)
    return lax.stop_gradient((images, metrics))


def _in_microbatches(
    attack: Callable[..., PyTree], count: int, group: int
) -> Callable[..., PyTree]:
    """The attack on one of `count` microbatches at a time."""
    # Strided microbatches, not contiguous ones: every device then holds some examples of each.
    unit = (group,) if group > 1 else ()

    def split(a):
        parts = a.reshape(-1, count, *unit, *a.shape[1:]).swapaxes(0, 1)
        return parts.reshape(count, -1, *a.shape[1:])

    def join(a):
        parts = a.reshape(count, -1, *unit, *a.shape[2:]).swapaxes(0, 1)
        return parts.reshape(-1, *a.shape[2:])

    def attack_all(logits_fn, x, y, example_keys, *args):
        batch = jax.tree.map(split, (x, y, example_keys))
        return jax.tree.map(join, lax.map(lambda b: attack(logits_fn, *b, *args), batch))

    return attack_all


def restricted(net: CorruptionNet, leaves: str) -> CorruptionNet:
    """A network whose theta has only the leaves that a regular expression matches.

    The other leaves are constants of its `apply`: they have no perturbation, no gradient and no
    copy per example.

    Args:
      net: the corruption network.
      leaves: as for `adversarial_augment`.

    Raises:
      UserError: the regular expression is invalid or matches no leaf.
    """
    perturbed, fixed = perturbation.split(net.theta, leaves)

    def apply(theta, x, key):
        return net.apply(perturbation.merge(theta, lax.stop_gradient(fixed)), x, key)

    return CorruptionNet(apply, perturbed)


def maximise(
    example_keys: jax.Array,
    x: jax.Array,
    loss_fn: Callable[[jax.Array], jax.Array],
    net: CorruptionNet,
    *,
    nu: float,
    steps: int,
    step_rule: str = "sign",
    step_scale: float = 0.25,
    group: int = 1,
    choice: str = "delta",
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Projected gradient ascent on delta from a random start in the ball (paper, equation 2).

    With `choice='mixing'` it is AdvMix in AdA's terms. Each example's leaf i becomes the
    interpolation theta_i + w_i delta_i between the network and a random corruption: delta is drawn
    uniformly in the ball, and the ascent finds the weights w_i in [0,1], one per leaf, from a
    random start. Its steps are those of a ball of radius 1, and its projection clips.

    From the papers: corruptions of one example are mixed into another one adversarially (Gowal et
    al., 2019, with latents of a generative model), the parameters of the corruption network are
    the latents, and some of them may be chosen (Calian et al., appendix C; see `restricted`).
    Ours: all the rest, because the paper gives no formula. A delta drawn for another example has
    the same distribution as one drawn from a key of the example's own, so the latter is used; the
    result then does not depend on the other examples.

    Args:
      example_keys: one key per example [B].
      x: images [B,H,W,C] in [0,1].
      loss_fn: images [B,H,W,C] -> losses [B].
      net, nu, steps, step_rule, step_scale, group, choice: as for `adversarial_augment`.

    Returns:
      delta, a tree of [B/group, *theta_i.shape] inside its balls, and metrics [B]: 'loss_start'
      (0 without steps) and 'on_surface'.
    """
    x, net = lax.stop_gradient(x), net._replace(theta=lax.stop_gradient(net.theta))
    loss_fn = checks.detached(loss_fn, x)
    radii = perturbation.radii(net.theta, nu)
    step = perturbation.STEP_RULES[step_rule]
    variable = _variable(choice, _of_groups(example_keys, group), net.theta, radii)

    def total_loss(chosen):
        # A sum, not a mean, makes an example's gradient independent of the batch size.
        per_example = loss_fn(_render(net.apply, variable.weights(chosen), x, example_keys))
        return per_example.sum(), per_example

    def ascend(i, carry):
        chosen, start = carry
        gradient, loss = jax.grad(total_loss, has_aux=True)(chosen)
        start = jnp.where(i == 0, loss, start)
        chosen = perturbation.add(chosen, step(gradient, variable.radii, step_scale))
        return variable.project(chosen), start

    start = jnp.zeros_like(x, jnp.float32, shape=(len(x),))
    chosen, start = lax.fori_loop(0, steps, ascend, (variable.start, start))
    delta = lax.stop_gradient(variable.delta(chosen))
    on_surface = perturbation.on_surface(delta, radii)
    if group > 1:
        on_surface = jnp.repeat(on_surface, group)
    return delta, {"loss_start": start, "on_surface": on_surface}


class _Variable(NamedTuple):
    """What the ascent varies, a tree of [G,...].

    Attributes:
      start: its random start.
      radii: a scalar per leaf, which scales the steps.
      project: its projection onto the feasible set.
      weights: computes theta + delta from it.
      delta: computes delta from it.
    """

    start: PyTree
    radii: PyTree
    project: Callable[[PyTree], PyTree]
    weights: Callable[[PyTree], PyTree]
    delta: Callable[[PyTree], PyTree]


def _variable(choice: str, keys: jax.Array, theta: PyTree, radii: PyTree) -> _Variable:
    """The optimisation variable of `maximise` for groups with these keys."""
    if choice == "mixing":
        return _mixing(keys, theta, radii)

    def delta(weights):
        return perturbation.project(jax.tree.map(jnp.subtract, weights, theta), radii)

    def project(weights):
        return perturbation.add(theta, delta(weights))

    # The loop carries theta + delta instead of delta, so that a step does not write both.
    start = perturbation.add(theta, perturbation.init(keys, theta, radii))
    return _Variable(start, radii, project, lambda weights: weights, delta)


def _mixing(keys: jax.Array, theta: PyTree, radii: PyTree) -> _Variable:
    """AdvMix: the mixing weights of random corruptions, see `maximise`."""
    delta_keys, weight_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    mix = functools.partial(perturbation.mix, perturbation.init(delta_keys, theta, radii))

    def weights(mixing):
        return perturbation.add(theta, mix(mixing))

    start = perturbation.init_weights(weight_keys, theta)
    ones = jax.tree.map(jnp.ones_like, radii)
    return _Variable(start, ones, perturbation.clip, weights, mix)


def render(net: CorruptionNet, delta: PyTree, x: jax.Array, example_keys: jax.Array) -> jax.Array:
    """Applies each group's own network: c_{theta + delta_i}(x_i), clipped to [0,1].

    Args:
      net: the corruption network.
      delta: tree of [G, *theta_i.shape]; each of the G groups has B/G consecutive images.
      x: images [B,H,W,C] in [0,1].
      example_keys: [B]; that of a group's first image fixes a stochastic network's noise, which is
        then equal in all steps. The network gets a key derived from it.

    Returns:
      Images [B,H,W,C] in [0,1].
    """
    return _render(net.apply, perturbation.add(net.theta, delta), x, example_keys)


def _render(
    apply: Callable[..., jax.Array], weights: PyTree, x: jax.Array, example_keys: jax.Array
) -> jax.Array:
    """`render` with weights theta + delta, a tree of [G, *theta_i.shape]."""
    group = len(x) // len(jax.tree.leaves(weights)[0])

    def one(weights, x, key):
        key = jax.random.fold_in(key, 2)  # Its children 0 and 1 draw the start of the ascent.
        if group > 1:
            return apply(weights, x, key).astype(jnp.float32)
        return apply(weights, x[None], key)[0].astype(jnp.float32)

    groups = x if group == 1 else x.reshape(-1, group, *x.shape[1:])
    rendered = jax.vmap(one)(weights, groups, _of_groups(example_keys, group))
    return jnp.clip(rendered.reshape(x.shape), 0.0, 1.0)


def _of_groups(example_keys: jax.Array, group: int) -> jax.Array:
    """The key of each group, that of its first example."""
    return example_keys if group == 1 else example_keys[::group]


def _check(net, x, ssim_threshold, microbatch, group) -> None:
    if not isinstance(net, CorruptionNet):
        raise UserError(
            f"net={net!r} is not an ada_jax.CorruptionNet: use ada_jax.make_corruption_net(name), "
            "or make one from an apply function and its parameters."
        )
    if not jax.tree.leaves(net.theta):
        raise UserError("net.theta has no parameters to perturb: give a network that has some.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(net.theta):
        if not _is_real(leaf):
            name, kind = jax.tree_util.keystr(path), getattr(leaf, "dtype", type(leaf).__name__)
            raise UserError(f"net.theta{name} is of type {kind}: give arrays of real numbers.")
    one = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    theta = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), jnp.float32), net.theta)
    try:
        # A new function object, see `checks.num_classes`.
        apply = lambda *args: net.apply(*args)  # noqa: E731
        rendered = jax.eval_shape(apply, theta, one, jax.random.key(0))
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError) as error:  # Wrong shapes or arguments.
        raise UserError(
            f"net.apply fails for images {list(one.shape)} and float32 parameters: "
            f"{first_line(error)}: correct it, or use a network for images of this shape."
        ) from error
    if hasattr(rendered, "dtype") and jnp.issubdtype(rendered.dtype, jnp.floating):
        rendered = rendered.shape
    if rendered != one.shape:
        raise UserError(
            f"net.apply must preserve the image shape, floating-point {list(one.shape)}, but gives "
            f"{rendered}: use a network for images of this shape."
        )
    check_size(ssim_threshold, x)
    checks.check_integers(0, microbatch=microbatch or 0)
    if microbatch and len(x) % microbatch:
        raise UserError(
            f"microbatch={microbatch} does not divide the batch of {len(x)}: use a divisor."
        )
    checks.check_integers(1, group=group)
    if (microbatch or len(x)) % group:
        raise UserError(
            f"group={group} does not divide the {microbatch or len(x)} examples that are attacked "
            "at a time: use a divisor."
        )


def _is_real(leaf: Any) -> bool:
    if isinstance(leaf, bool | int | float):
        return True
    kinds = jnp.floating, jnp.integer, jnp.bool_
    return isinstance(leaf, jax.Array | np.ndarray | np.generic) and any(
        jnp.issubdtype(leaf.dtype, kind) for kind in kinds
    )


def check_size(ssim_threshold: jax.Array | float, x: jax.Array | jax.ShapeDtypeStruct) -> None:
    """Raises UserError for images [B,H,W,C] that are too small for the line search, if it is on."""
    if checks.scalar("ssim_threshold", ssim_threshold, 0.0) > -1 and not ssim.fits(x):
        raise UserError(
            f"ssim_threshold={ssim_threshold} needs images of at least {ssim.WINDOW}x{ssim.WINDOW} "
            f"pixels, not {x.shape[1]}x{x.shape[2]}: set it to -1, which disables the search."
        )


def check_settings(
    nu: jax.Array | float,
    steps: int,
    step_rule: str,
    step_scale: jax.Array | float,
    ssim_threshold: jax.Array | float,
    root_rule: str,
) -> None:
    """Raises UserError for a setting of `adversarial_augment` that is out of range."""
    if not 0 <= checks.scalar("nu", nu, 0.0) < np.inf:
        raise UserError(f"nu={nu} must be non-negative and finite (the paper's value is 0.015).")
    if not 0 < checks.scalar("step_scale", step_scale, 1.0) < np.inf:
        raise UserError(
            f"step_scale={step_scale} must be positive and finite (the paper's value is 0.25)."
        )
    if not -1 <= checks.scalar("ssim_threshold", ssim_threshold, 0.0) < 1:
        raise UserError(f"ssim_threshold={ssim_threshold} must be in [-1, 1); -1 disables it.")
    checks.check_integers(0, steps=steps)
    if step_rule not in perturbation.STEP_RULES:
        known = ", ".join(perturbation.STEP_RULES)
        raise UserError(f"step_rule={step_rule!r} is unknown: choose one of {known}.")
    if root_rule not in ssim.ROOT_RULES:
        known = ", ".join(ssim.ROOT_RULES)
        raise UserError(f"root_rule={root_rule!r} is unknown: choose one of {known}.")
