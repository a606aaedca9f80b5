"""The update step: crop and flip, TrivialAugment, AdA or another attack, AugMix, noise, classifier
update with mixup.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import ml_collections
import optax

from ada_jax import ada, attacks, keys, losses, perceptual
from ada_jax.attacks import rlat
from ada_jax.augment import augmix, cropping, mixup, norm_noise, trivial_augment
from ada_jax.data import batching
from ada_jax.nets import classifiers, corruption_nets
from ada_jax.sharding import AXIS

METHODS = ("ada", "nominal", "pat", "pgd", "rlat")


class TrainState(NamedTuple):
    """The state of training.

    Attributes:
      step: updates made, int32 scalar.
      params: the classifier's parameters.
      net_state: its batch-norm averages.
      opt_state: the optimiser's state.
      ema: exponential moving averages of `params` and `net_state`; () without config.ema_decay.
    """

    step: jax.Array
    params: hk.Params
    net_state: hk.State
    opt_state: optax.OptState
    ema: tuple[hk.Params, hk.State] | tuple[()] = ()


# ------------------------------------------------------------------------ the step


def make_update_step(
    config: ml_collections.ConfigDict,
    classifier: hk.TransformedWithState,
    net_applies: Sequence[Callable[..., jax.Array]],
    optimizer: optax.GradientTransformation,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Makes the step of one device: crop/flip -> AdA -> line search -> AugMix -> update -> metrics.

    Adversarial training and PAT have their attack in AdA's place. RLAT's is part of the update.
    TrivialAugment comes before AdA, noise after AugMix, and mixup within the classifier.

    Args:
      config: the run's config.
      classifier: Haiku classifier.
      net_applies: functions of AdA's corruption networks, one of which is drawn for every batch, or
        `(theta, images) -> features` of the network that bounds PAT; else empty.
      optimizer: the classifier's.

    Returns:
      `update_step(state, thetas, batch, key) -> (state, metrics)`, to be mapped over AXIS; `thetas`
      has a tree for each network, `batch` has a device's 'image' [b,H,W,3] and 'label' [b].
    """
    if config.method == "ada":
        precision = {"dtype": config.compute_dtype, "remat": config.ada.remat}
        net_applies = [corruption_nets.cast(apply, **precision) for apply in net_applies]
    attack = make_attack(config, classifier, net_applies)
    gradient_fn = jax.grad(make_loss(config, classifier), has_aux=True)

    def update_step(state, thetas, batch, key):
        x, y = batching.to_float(batch["image"]), batch["label"]
        # Keys depend on the position in the global batch, not on the number of devices.
        key = jax.random.fold_in(key, state.step)
        example_keys = keys.of_positions(key, jax.lax.axis_index(AXIS) * len(y), len(y))
        crop_keys, ada_keys = jnp.moveaxis(jax.vmap(jax.random.split)(example_keys), 1, 0)

        clean = x = cropping.random_crop_flip(crop_keys, x, pad=config.pad, flip=config.flip)
        if config.trivial_augment.use:
            ops = trivial_ops(config.trivial_augment)
            x = trivial_augment.trivial_augment(folded(example_keys, 4), x, ops=ops)
        metrics = {}
        if attack:
            x, attacked = attack(key, state, thetas, ada_keys, x, y)
            metrics = attack_metrics(config.method, attacked)
        x = make_views(example_keys, clean, x, config)
        perturbations, mixed = {}, {}
        if config.method == "rlat":
            x, perturbations, start = perturb_layers(classifier, state, x, y, config.rlat.epsilon)
            metrics = attack_metrics(config.method, {"loss_start": start})
        if config.mixup.alpha:
            mixup_key = jax.random.fold_in(key, config.batch_size + 1)  # Not an example's.
            perturbations, mixed = draw_mixup(mixup_key, config.mixup, len(y))
        gradient, (net_state, loss, logits) = gradient_fn(
            state.params, state.net_state, x, y, perturbations, mixed
        )
        gradient, net_state = average((gradient, net_state))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        metrics |= {
            "loss": loss,
            "error": 100 * jnp.mean(jnp.argmax(logits, -1) != y),
            "gradient_norm": optax.tree.norm(gradient),
        }
        state = state._replace(params=params, net_state=net_state, opt_state=opt_state)
        if config.ema_decay:
            state = state._replace(ema=moved_average(state, config.ema_decay))
        return state._replace(step=state.step + 1), reduce_metrics(metrics)

    return update_step


def make_loss(
    config: ml_collections.ConfigDict, classifier: hk.TransformedWithState
) -> Callable[..., tuple[jax.Array, tuple[hk.State, jax.Array, jax.Array]]]:
    """Makes the loss of the update: cross-entropy, weight decay and AugMix's consistency loss.

    Returns:
      `loss_fn(params, net_state, views, y, perturbations, mixed) -> (loss, (net_state,
      cross_entropy, logits))`, where views are images [b,H,W,3] or [3b,H,W,3], `perturbations` are
      those of the classifier, `mixed` has mixup's 'partner' and 'share' or is empty, and logits
      [b,K] are those of the first view, of mixed images with mixup.
    """

    def cross_entropy(logits, y, mixed):
        function = mixup.cross_entropy if mixed else losses.cross_entropy
        return function(logits, y, smoothing=config.label_smoothing, **mixed)

    def loss_fn(params, net_state, views, y, perturbations, mixed):
        logits, net_state = classifier.apply(
            params, net_state, None, views, is_training=True, perturbations=perturbations
        )
        decay = config.weight_decay * losses.weight_decay(params, include_bn=config.weight_decay_bn)
        parts = jnp.split(logits, len(views) // len(y))
        labelled = parts if config.augmix.label_views else parts[:1]
        loss = jnp.mean(jnp.stack([cross_entropy(part, y, mixed) for part in labelled]))
        consistency = losses.jsd(*parts).mean() if len(parts) > 1 else 0.0
        total = loss + decay + config.augmix.jsd_weight * consistency
        return total, (net_state, loss, parts[0])

    return loss_fn


def draw_mixup(
    key: jax.Array, settings: ml_collections.ConfigDict, examples: int
) -> tuple[dict[str, Callable[[jax.Array], jax.Array]], dict[str, jax.Array]]:
    """Draws mixup's layer, partners, share and noise for one device's batch.

    An example's partner is on the same device: results depend on the number of devices.

    Args:
      key: equal on every device, and so are the share and the layer.
      settings: config.mixup.
      examples: b.

    Returns:
      The classifier's perturbations, and 'partner' and 'share' of `mixup.cross_entropy`.
    """
    pair_key, layer_key, noise_key = jax.random.split(key, 3)
    noise_key = jax.random.fold_in(noise_key, jax.lax.axis_index(AXIS))
    partner, share = mixup.pair(pair_key, examples, alpha=settings.alpha)

    def change(features):
        mixed, views = mixup.mix(features, partner, share), len(features) // examples
        return mixup.noisy(noise_key, mixed, views=views, **mixup_levels(settings))

    perturbations = mixup.at_one_layer(layer_key, settings.layers, change)
    return perturbations, {"partner": partner, "share": share}


def make_attack(
    config: ml_collections.ConfigDict,
    classifier: hk.TransformedWithState,
    net_applies: Sequence[Callable[..., jax.Array]],
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]] | None:
    """Makes the attack on one device's batch; see `make_update_step` for the arguments.

    Returns:
      `attack(key, state, thetas, example_keys, x, y) -> (images, metrics)`, where `key` is the
      step's, the same on every device, and metrics are per attacked example; None without an
      attack.
    """

    def logits_fn(state, batch_norm, x):
        return classifier.apply(
            state.params,
            state.net_state,
            None,
            x,
            is_training=False,
            test_local_stats=batch_norm == "batch",
        )[0]

    def ada_attack(key, state, thetas, example_keys, x, y):
        nets = map(ada.CorruptionNet, net_applies, thetas)
        pairs = [{"net": net, "choice": choice} for net in nets for choice in config.ada.choice]
        # The same pair on every device. No example has this position.
        key = jax.random.fold_in(key, config.batch_size)
        drawn = jax.random.randint(key, (), 0, len(pairs))
        augment = functools.partial(
            ada.adversarial_augment,
            logits_fn=functools.partial(logits_fn, state, config.ada.batch_norm),
            microbatch=config.ada.microbatch or None,
            group=config.ada.group,
            leaves=config.ada.leaves,
            **attack_settings(config.ada),
        )
        branches = [functools.partial(augment, **pair) for pair in pairs]
        attacked = slice(None, None, config.ada.every)
        examples = example_keys[attacked], x[attacked], y[attacked]
        images, metrics = jax.lax.switch(drawn, branches, *examples)
        return (images if config.ada.every == 1 else x.at[attacked].set(images)), metrics

    def pgd_attack(key, state, thetas, example_keys, x, y):
        del key, thetas
        images, info = attacks.pgd(
            example_keys,
            functools.partial(logits_fn, state, config.pgd.batch_norm),
            x,
            y,
            config.pgd.epsilon,
            norm=config.pgd.norm,
            steps=config.pgd.steps,
            step_size=config.pgd.step_scale * config.pgd.epsilon,
        )
        return jax.lax.stop_gradient((images, {"broken": info["broken"]}))

    pat_attack = functools.partial(_pat_attack, config, classifier, net_applies)
    return {"ada": ada_attack, "pgd": pgd_attack, "pat": pat_attack}.get(config.method)


def _pat_attack(config, classifier, net_applies, key, state, thetas, example_keys, x, y):
    """PAT's attack, see `make_attack`: LPIPS is the classifier's own or that of the network."""
    del key
    model = own = perceptual.model_of(classifier, state.params, state.net_state)
    if net_applies:
        model = lambda x: (own(x)[0], net_applies[0](thetas[0], x))  # noqa: E731
    settings = pat_settings(config.pat)
    return attacks.fast_lpa(example_keys, model, x, y, config.pat.bound, **settings)


def perturb_layers(
    classifier: hk.TransformedWithState,
    state: TrainState,
    views: jax.Array,
    y: jax.Array,
    epsilon: float,
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """RLAT's step on images and layers, with batch norm's statistics of the batch.

    Args:
      classifier: Haiku classifier.
      state: the state.
      views: images [b,H,W,3] or, for AugMix's consistency loss, [3b,H,W,3].
      y: labels [b].
      epsilon: l2 radius of an image.

    Returns:
      The perturbed images, the perturbations of `classifiers.feature_shapes`, and the loss of each
      image without them. The running statistics are updated in the perturbed pass alone.
    """
    labels = jnp.tile(y, len(views) // len(y))

    def loss_fn(images, deltas):
        logits, _ = classifier.apply(
            state.params, state.net_state, None, images, is_training=True, perturbations=deltas
        )
        return losses.cross_entropy(logits, labels)

    layers = classifiers.feature_shapes(classifier, views.shape[1:])
    return rlat.perturb(loss_fn, views, layers, epsilon)


def folded(example_keys: jax.Array, number: int) -> jax.Array:
    """New keys of the examples [B], for one use of them.

    `split` made the keys of the crop and of AdA, which are those of 0 and 1.
    """
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(example_keys)


def make_views(
    example_keys: jax.Array, clean: jax.Array, x: jax.Array, config: ml_collections.ConfigDict
) -> jax.Array:
    """Applies AugMix and noise to images, and makes the views of the consistency loss.

    Args:
      example_keys: keys [b].
      clean: the images before TrivialAugment and the attack [b,H,W,3].
      x: the images after them [b,H,W,3].
      config: the run's config.

    Returns:
      Images [b,H,W,3]; for the consistency loss [3b,H,W,3], the images and two views of them.
    """

    def view(i):
        images = x
        if config.augmix.use:
            settings = augmix_settings(config.augmix)
            images = augmix.augment_and_mix(folded(example_keys, i), images, **settings)
        if config.noise.share:
            noise = noise_settings(config.noise)
            images = norm_noise.add_noise(folded(example_keys, i + 3), images, **noise)
        return images

    if not (config.augmix.use and config.augmix.jsd_weight):
        return view(2)
    return jnp.concatenate([clean if config.augmix.clean_view else x, view(2), view(3)])


def with_average(state: TrainState) -> TrainState:
    """The state before the first step, with its own weights as averages."""
    return state._replace(ema=(state.params, state.net_state))


def moved_average(state: TrainState, decay: float) -> tuple[hk.Params, hk.State]:
    """The averages after a step: decay * average + (1 - decay) * new, less at the start.

    The decay is at most (1 + step) / (10 + step), so that the first weights are forgotten.
    """
    step = state.step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))

    def moved(average, new):
        floating = jnp.issubdtype(new.dtype, jnp.floating)
        return decay * average + (1 - decay) * new if floating else new

    return jax.tree.map(moved, state.ema, (state.params, state.net_state))


def average(tree: Any) -> Any:
    """Mean over all devices; integers (batch norm's step counts) are equal on all of them."""
    return jax.tree.map(
        lambda a: jax.lax.pmean(a, AXIS) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )


def attack_metrics(method: str, attacked: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Means, and minima of SSIMs, of an attack's per-example metrics."""
    means = {f"{method}_{name}": jnp.mean(value) for name, value in attacked.items()}
    least = ("ssim_before", "ssim_after")
    return means | {f"{method}_{n}_min": jnp.min(attacked[n]) for n in least if n in attacked}


def reduce_metrics(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Reduces over all devices: the minimum of '*_min', the mean of the others."""
    return {
        name: (jax.lax.pmin if name.endswith("_min") else jax.lax.pmean)(value, AXIS)
        for name, value in metrics.items()
    }


def make_optimizer(
    config: ml_collections.ConfigDict, steps_per_epoch: float, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """SGD with Nesterov momentum, and its learning rate; weight decay is part of the loss.

    The rate rises linearly from 0 to max(lr * batch size / 256, lr), the linear scaling rule, and
    falls as a cosine towards 0 (paper, appendix A). PAT clips the gradient's values.
    """
    peak = max(config.learning_rate * config.batch_size / 256, config.learning_rate)
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, total_steps
    )
    sgd = optax.sgd(schedule, momentum=config.momentum, nesterov=True)
    if config.method == "pat":
        sgd = optax.chain(optax.clip(config.pat.gradient_clip), sgd)
    return sgd, schedule


def initial_state(
    classifier: hk.TransformedWithState,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    images: jax.Array,
) -> TrainState:
    """The state before the first step, with batch-norm averages of these images."""
    params, net_state = jax.jit(classifier.init, static_argnames="is_training")(
        key, images, is_training=True
    )
    return TrainState(jnp.zeros((), jnp.int32), params, net_state, optimizer.init(params))


# ------------------------------------------------------------------- arguments from the config


def attack_settings(settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """The arguments of `ada.adversarial_augment` from config.ada."""
    names = ("nu", "steps", "step_rule", "step_scale", "ssim_threshold", "root_rule")
    return {name: settings[name] for name in names}


def pat_settings(settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """The arguments of `attacks.fast_lpa` from config.pat, without the bound."""
    return {name: settings[name] for name in ("steps", "step_size", "penalty", "noise")}


def augmix_settings(settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """The arguments of `augmix.augment_and_mix` from config.augmix."""
    ops = augmix.OPS + (augmix.EXTRA_OPS if settings.extra_ops else ())
    names = ("severity", "width", "depth", "alpha")
    return {name: settings[name] for name in names} | {"ops": ops}


def trivial_ops(settings: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The operations of config.trivial_augment."""
    extra = () if settings.extra_ops else augmix.EXTRA_OPS
    return tuple(op for op in trivial_augment.OPS if op not in extra)


def noise_settings(settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """The arguments of `norm_noise.add_noise` from config.noise."""
    return {name: settings[name] for name in ("norms", "radii", "share")}


def mixup_levels(settings: ml_collections.ConfigDict) -> dict[str, float]:
    """The levels of `mixup.noisy` from config.mixup."""
    return {name: settings[name] for name in ("additive", "multiplicative", "sparsity")}
