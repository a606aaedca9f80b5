"""The paper's two studies of the corruption networks, each as a JSON file and a figure.

python -m ada_jax.study ssim          SSIM under random perturbations or AdA's (figure 1b)
python -m ada_jax.study reconstruct   SSIM between corrupted images and their best reconstruction
                                      (figure 3)
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import flags
from jax import lax

from ada_jax import (
    ada,
    evaluate,
    keys,
    locks,
    losses,
    paths,
    perturbation,
    sharding,
    ssim,
)
from ada_jax.corruptions import functions, parameter_tables
from ada_jax.data import core, sources, tiles
from ada_jax.errors import UserError, renamed, require_extra
from ada_jax.evaluation import scoring, worst_case
from ada_jax.nets import corruption_nets, weight_files
from ada_jax.report import figures
from ada_jax.run import cli

RADII = ("0.0075", "0.009375", "0.015", "0.03", "0.06")
PAPER = {"edsr": (0.91, 0.26), "cae": (0.84, 0.16)}  # mean and deviation over all corruptions


# ------------------------------------------------------------------------ the measurements


def random_ssim(net: ada.CorruptionNet, key: jax.Array, x: jax.Array, nu: float) -> jax.Array:
    """SSIM between images and their renderings by randomly perturbed networks (figure 1b).

    Args:
      net: the corruption network.
      key: one key per example [B].
      x: images [B,H,W,3] in [0,1].
      nu: relative radius; delta is uniform in the balls.

    Returns:
      [B].
    """
    delta = perturbation.init(key, net.theta, perturbation.radii(net.theta, nu))
    return ssim.ssim(x, ada.render(net, delta, x, key))


def attacked_ssim(
    net: ada.CorruptionNet,
    logits_fn: ada.LogitsFn,
    key: jax.Array,
    x: jax.Array,
    y: jax.Array,
    *,
    nu: float,
    steps: int,
) -> jax.Array:
    """SSIM between images and their adversarial renderings, before any line search.

    Args:
      net: the corruption network.
      logits_fn: the classifier, [b,H,W,3] -> [b,K].
      key: one key per example [B].
      x: images [B,H,W,3] in [0,1].
      y: labels [B].
      nu: relative radius.
      steps: of the ascent.

    Returns:
      [B].
    """
    loss_fn = lambda images: losses.cross_entropy(logits_fn(images), y)  # noqa: E731
    delta, _ = ada.maximise(key, x, loss_fn, net, nu=nu, steps=steps)
    return ssim.ssim(x, ada.render(net, delta, x, key))


def reconstruct(
    net: ada.CorruptionNet,
    key: jax.Array,
    x: jax.Array,
    target: jax.Array,
    *,
    steps: int = 50,
    learning_rate: float = 1e-3,
    penalty: float = 1e-5,
) -> jax.Array:
    """How well perturbed networks can imitate corruptions of their inputs (equation 6).

    Adam maximises SSIM(c_{theta+delta}(x), target) - penalty ||delta||^2 over one delta per
    example, starting at zero and without a ball.

    Args:
      net: the corruption network.
      key: one key per example [B]; a stochastic network's noise is fixed by it.
      x: clean images [B,H,W,3] in [0,1].
      target: the same images corrupted.
      steps: of Adam.
      learning_rate: of Adam.
      penalty: see above.

    Returns:
      SSIM [B] of the clipped images after the last step.
    """
    adam = optax.adam(learning_rate)
    delta = jax.tree.map(lambda a: jnp.zeros((len(x), *a.shape), jnp.float32), net.theta)

    def similarity(delta):
        theta = perturbation.add(net.theta, delta)
        one = lambda theta, x, key: net.apply(theta, x[None], key)[0]  # noqa: E731
        return ssim.ssim(target, jax.vmap(one)(theta, x, key))

    def loss(delta):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(delta))
        return penalty * squares - similarity(delta).sum()

    def ascend(_, carry):
        delta, state = carry
        updates, state = adam.update(jax.grad(loss)(delta), state)
        return optax.apply_updates(delta, updates), state

    delta, _ = lax.fori_loop(0, steps, ascend, (delta, adam.init(delta)))
    return ssim.ssim(target, ada.render(net, delta, x, key))


def in_batches(f: Callable[..., jax.Array], *arrays: np.ndarray, batch_size: int) -> np.ndarray:
    """Values [N] of `f(keys, *arrays)` of arrays [N,...], in batches over all devices."""
    example_keys = keys.of_positions(jax.random.key(0), 0, len(arrays[0]))
    return sharding.in_batches(jax.pmap(f, sharding.AXIS), (example_keys, *arrays), batch_size)


# ------------------------------------------------------------------------ the studies


def study_ssim(
    nets: dict[str, ada.CorruptionNet],
    x: np.ndarray,
    settings: dict[str, Any],
    batch_size: int,
    attack: tuple[ada.LogitsFn, np.ndarray] | None = None,
) -> dict[str, Any]:
    """SSIM under perturbations of each network at each radius, random or AdA's.

    Args:
      nets: by name.
      x: images [N,H,W,3] in [0,1].
      settings: 'radii', as strings, and AdA's 'attack_steps'.
      batch_size: examples at a time, over all devices.
      attack: the classifier and the labels [N]; None perturbs at random.

    Returns:
      By network and radius ('0' without perturbation): 'mean', 'std' and all 'values'.
    """
    results: dict[str, Any] = {name: {} for name in nets}
    radii = ("0", *settings["radii"])
    for name, nu in tqdm.tqdm([(name, nu) for name in nets for nu in radii], desc="radii"):
        net, radius = nets[name], float(nu)
        if attack:
            logits_fn, labels = attack
            f = functools.partial(
                attacked_ssim, net, logits_fn, nu=radius, steps=settings["attack_steps"]
            )
            values = in_batches(f, x, labels, batch_size=batch_size)
        else:
            f = functools.partial(random_ssim, net, nu=radius)
            values = in_batches(f, x, batch_size=batch_size)
        results[name][nu] = _summary(values) | {"values": np.round(values, 5).tolist()}
    return results


def study_reconstruct(
    nets: dict[str, ada.CorruptionNet],
    images: np.ndarray,
    settings: dict[str, Any],
    batch_size: int,
    results: dict[str, Any],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Reconstruction of each corruption by each network (equation 6, figure 3).

    Args:
      nets: by name.
      images: [N,H,W,3] uint8; each has its own severity, drawn uniformly from 1..5.
      settings: 'corruptions', 'steps', 'learning_rate' and 'seed'.
      batch_size: examples at a time, over all devices.
      results: of an earlier call; what is in it is not measured again.
      save: called with the results after each corruption.

    Returns:
      By network and corruption: 'mean' and 'std' of SSIM(reconstruction, corrupted), and 'before',
      the mean of SSIM(clean, corrupted).
    """
    tasks = [(n, c) for n in nets for c in settings["corruptions"] if c not in results.get(n, {})]
    for name, corruption in tqdm.tqdm(tasks, desc="corruptions"):
        target = corrupted(corruption, images, settings["seed"])

        arrays = (_to_float(images), _to_float(target))
        adam = {k: settings[k] for k in ("steps", "learning_rate")}
        f = functools.partial(reconstruct, nets[name], **adam)
        values = in_batches(f, *arrays, batch_size=batch_size)
        before = np.asarray(jax.jit(ssim.ssim)(*map(jnp.asarray, arrays)))
        summary = _summary(values) | {"before": float(before.mean())}
        results.setdefault(name, {})[corruption] = summary
        save(results)
    return results


def corrupted(name: str, images: np.ndarray, seed: int) -> np.ndarray:
    """Corrupts images [N,H,W,3] uint8, each at a severity drawn uniformly from 1..5."""
    severities = np.random.default_rng(seed).integers(1, 6, len(images))
    out = np.empty_like(images)
    for severity in range(1, 6):
        chosen = np.flatnonzero(severities == severity)
        out[chosen] = functions.corrupt(name, severity, images[chosen], seed, indices=chosen)
    return out


def _to_float(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 255


def _summary(values: np.ndarray) -> dict[str, float]:
    if not np.isfinite(values).all():
        raise UserError(
            "The SSIM of some images is not finite: take smaller --radii or a smaller "
            "--learning_rate."
        )
    return {"mean": float(values.mean()), "std": float(values.std())}


def ssim_table(results: dict[str, Any]) -> str:
    """The SSIM study as a Markdown table."""
    radii = list(next(iter(results.values())))
    rows = [f"| nu | {' | '.join(radii)} |", "|---" * (len(radii) + 1) + "|"]
    for name, by_radius in results.items():
        cells = [f"{by_radius[nu]['mean']:.4f} ± {by_radius[nu]['std']:.4f}" for nu in radii]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def reconstruct_table(results: dict[str, Any]) -> str:
    """The reconstruction study as a Markdown table, with the paper's means over all corruptions."""
    names = list(results)
    done = [c for c in results[names[0]] if all(c in results[n] for n in names)]
    rows = [f"| corruption | clean | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for c in done:
        cells = [f"{results[n][c]['mean']:.2f} ± {results[n][c]['std']:.2f}" for n in names]
        rows.append(f"| {c} | {results[names[0]][c]['before']:.2f} | {' | '.join(cells)} |")
    means = [np.mean([results[n][c]["mean"] for c in done]) for n in names]
    before = np.mean([results[names[0]][c]["before"] for c in done])
    rows.append(f"| mean of {len(done)} | {before:.2f} | {' | '.join(f'{m:.2f}' for m in means)} |")
    paper = [PAPER[n.partition("_")[0]] for n in names]
    rows.append(f"| paper | | {' | '.join(f'{mean:.2f} ± {std:.2f}' for mean, std in paper)} |")
    return "\n".join(rows)


# ------------------------------------------------------------------------ the command


def load_images(
    dataset: str,
    split: str,
    data_dir: str,
    count: int,
    seed: int,
    class_names: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """A random subset of a data set.

    Returns:
      Images [count,H,W,3] uint8; labels [count], in the order of `class_names` if given; and the
      number of classes.

    Raises:
      UserError: there are fewer images, images that are not uint8, or other classes.
    """
    if dataset == "photos":
        squares = [
            tiles.cut(tiles.photo(name), side=32, step=32, most=4096)
            for name in tiles.PHOTOS["test"]
        ]
        source = core.from_arrays(
            np.concatenate(squares), np.zeros(sum(map(len, squares)), int), class_names=("photo",)
        )
    else:
        source = sources.load(dataset, split, data_dir=data_dir or None)
    if class_names:
        source = core.renumbered(source, class_names)
    if len(source) < count:
        raise UserError(
            f"--examples={count} is more than the {len(source)} images of --dataset={dataset}: "
            "take fewer."
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(source))[:count])
    examples = [source.source[int(i)] for i in chosen]
    images = np.stack([np.asarray(image) for image, _ in examples])
    if images.dtype != np.uint8:
        raise UserError(f"--dataset={dataset} has images of {images.dtype}: save them as uint8.")
    return images, np.array([label for _, label in examples], np.int32), source.num_classes


def read_results(path: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The results of an earlier run with the same settings; {} if there is none.

    Raises:
      UserError: the file is of other settings, or damaged.
    """
    if not paths.exists(path):
        return {}
    try:
        written = paths.read_json(path)
        before, results = written["settings"], dict(written["results"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read ({error!r}): name another --out or rename that file."
        ) from error
    if before != json.loads(json.dumps(settings)):
        raise UserError(f"{path} is of other settings: name another --out or rename that file.")
    return results


def main(argv: list[str]) -> None:
    """Runs a study."""
    try:
        _run(argv, flags.FLAGS)
    except UserError as error:
        names = {"config.data_dir": "--data_dir", "config.dataset": "--dataset"}
        names["corruption_net="] = "--nets="
        raise renamed(error, evaluate.DATA_FLAGS | names) from error


def _run(argv: list[str], f: flags.FlagValues) -> None:
    if len(argv) != 2 or argv[1] not in ("ssim", "reconstruct"):
        raise UserError("Name one study: python -m ada_jax.study ssim, or reconstruct.")
    study, known = argv[1], tuple(parameter_tables.TABLES["cifar"])
    if unknown := sorted(set(f.corruptions) - set(known)):
        raise UserError(f"--corruptions={unknown[0]} is unknown: choose from {', '.join(known)}.")
    for flag in ("nets", "radii", "corruptions"):
        if not f[flag].value:
            raise UserError(f"--{flag} is empty: name at least one.")
    worst_case.check_radii("radii", f.radii)
    if study == "ssim" and f.examples < 2:
        raise UserError(
            f"--examples={f.examples} is too few for densities of SSIM: give 2 or more."
        )
    if study == "ssim" and not any(map(float, f.radii)):
        raise UserError(
            f"--radii={','.join(f.radii)} has no positive radius: add one, such as 0.015."
        )
    for flag in ("out", "workdir"):
        paths.check_bucket(f"--{flag}={f[flag].value}", f[flag].value)
    require_extra("The study's figure", "matplotlib")
    cli.set_up_devices(f.cpu_devices, "~/.cache/ada_jax")
    nets = {name: corruption_nets.make(name) for name in f.nets}
    class_names = scoring.metadata(f.workdir).get("class_names") if f.workdir else None
    images, labels, classes = load_images(
        f.dataset, f.split, f.data_dir, f.examples, f.seed, class_names
    )
    corruption_nets.check_sizes("--nets", f.nets, [1] * len(f.nets), images.shape[1:])
    settings = {"dataset": f.dataset, "split": f.split, "examples": f.examples, "seed": f.seed}
    settings["nets"] = {name: weight_files.digest(net.theta) for name, net in nets.items()}
    settings["images"] = weight_files.digest({"images": images, "labels": labels})
    json_path, png_path = (os.path.join(f.out, f"{study}.{kind}") for kind in ("json", "png"))

    def save(results: dict[str, Any]) -> None:
        paths.write_json(json_path, {"settings": settings, "results": results})

    with locks.hold(f"--out={f.out}", locks.of_folder(f.out)):
        if study == "ssim":
            settings |= {"radii": f.radii, "workdir": f.workdir, "attack_steps": f.attack_steps}
            attack = (scoring.load_classifier(f.workdir, classes), labels) if f.workdir else None
            read_results(json_path, settings)  # Checks that it has the same settings.
            results = study_ssim(nets, _to_float(images), settings, f.batch_size, attack)
            save(results)
            figures.ssim_densities(png_path, results)
            table = ssim_table(results)
        else:
            settings |= {"corruptions": f.corruptions, "steps": f.steps}
            settings["learning_rate"] = f.learning_rate
            results = read_results(json_path, settings)
            results = study_reconstruct(nets, images, settings, f.batch_size, results, save)
            # The file does not keep the order of the flags.
            results = {n: {c: results[n][c] for c in f.corruptions} for n in f.nets}
            figures.reconstruction_bars(png_path, results)
            table = reconstruct_table(results)
    print(f"{table}\n\n{json_path}\n{png_path}")


if __name__ == "__main__":
    flags.DEFINE_list("nets", ["edsr_baseline_x4", "cae"], "Corruption networks.")
    flags.DEFINE_string("dataset", "cifar10", "'photos' or a data set of ada_jax.data.")
    flags.DEFINE_string("split", "test", "Split of the data set, or a slice of it.")
    flags.DEFINE_string("data_dir", "", "Folder or file of the data.")
    flags.DEFINE_integer("examples", 640, "Number of images, drawn at random.", lower_bound=1)
    flags.DEFINE_integer(
        "seed",
        0,
        "Seed of the choice of images and of the corruptions.",
        lower_bound=0,
        upper_bound=2**32 - 1,
    )
    flags.DEFINE_integer("batch_size", 32, "Examples at a time, over all devices.", lower_bound=1)
    flags.DEFINE_integer(
        "cpu_devices", 2, "Number of devices that a CPU is split into.", lower_bound=1
    )
    flags.DEFINE_string("out", "runs/study", "Folder for the JSON file and the figure.")
    flags.DEFINE_list("radii", list(RADII), "ssim: relative radii.")
    flags.DEFINE_string(
        "workdir", "", "ssim: run whose classifier AdA attacks; '' perturbs at random."
    )
    flags.DEFINE_integer("attack_steps", 10, "ssim: steps of AdA.", lower_bound=0)
    flags.DEFINE_list("corruptions", list(parameter_tables.NAMES), "reconstruct: corruptions.")
    flags.DEFINE_integer("steps", 50, "reconstruct: steps of Adam.", lower_bound=1)
    flags.DEFINE_float(
        "learning_rate", 1e-3, "reconstruct: learning rate of Adam.", lower_bound=0.0
    )
    cli.start(main, arguments=True)
