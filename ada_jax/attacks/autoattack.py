"""AutoAttack: four attacks in sequence, each on the examples that the previous ones did not break.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks" (2020), section 5, the 'standard' version.
"""

import dataclasses
import functools
import hashlib
import inspect
import io
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ada_jax import checks, keys, paths
from ada_jax.attacks import loops
from ada_jax.attacks.apgd import apgd
from ada_jax.attacks.fab import fab
from ada_jax.attacks.loops import LogitsFn
from ada_jax.attacks.pgd import multitargeted
from ada_jax.attacks.square import square
from ada_jax.errors import UserError, first_line
from ada_jax.sharding import AXIS, shard

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
# An attack's position determines its keys, so its draws do not depend on the other attacks.
_ATTACKS: dict[str, Callable] = {
    "apgd-ce": functools.partial(apgd, loss="ce"),
    "apgd-t": functools.partial(apgd, loss="dlr-targeted"),
    "fab-t": functools.partial(fab, search_steps=0),
    "square": square,
    "apgd-dlr": functools.partial(apgd, loss="dlr"),
    "multitargeted": multitargeted,
}
ATTACKS = tuple(_ATTACKS)
# Images may lie _TOLERANCE * (1 + epsilon) outside the ball, because of rounding errors.
_TOLERANCE = 1e-6

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class Account:
    """Statistics of one attack.

    Attributes:
      attack: name, one of ATTACKS.
      attacked: number of examples attacked.
      broken: number of examples broken.
      robust_accuracy: share of all examples that are still classified correctly, in [0,1].
      forward: number of images passed through the classifier, except for the final check.
      backward: number of images whose gradient was computed.
      seconds: wall-clock time, including compilation.
    """

    attack: str
    attacked: int
    broken: int
    robust_accuracy: float
    forward: int
    backward: int
    seconds: float


@dataclasses.dataclass
class Report:
    """Result of a sequence of attacks.

    Attributes:
      name: 'AutoAttack' if all four standard attacks ran, none of them with `constants`, and there
        are at least four classes, followed by any other attacks, such as
        'AutoAttack+multitargeted'; else 'partial: ' and the attacks.
      norm: 'linf' or 'l2'.
      epsilon: radius, in units of pixel values.
      images: [N,H,W,C] in [0,1], the misclassified image if an attack found one, else x.
      robust: bool [N], whether no attack broke the example and x is classified correctly.
      broken_by: [N], name of the attack, 'clean' if x itself is misclassified, '' if robust.
      clean_accuracy: share of examples classified correctly without an attack.
      robust_accuracy: share of robust examples.
      accounts: one per attack, in order.
      warnings: reasons why the result may be unreliable.
    """

    name: str
    norm: str
    epsilon: float
    images: np.ndarray
    robust: np.ndarray
    broken_by: np.ndarray
    clean_accuracy: float
    robust_accuracy: float
    accounts: list[Account]
    warnings: list[str]


def autoattack(
    key: jax.Array,
    logits_fn: LogitsFn,
    x: np.ndarray,
    y: np.ndarray,
    epsilon: float,
    *,
    norm: str = "linf",
    attacks: Sequence[str] = STANDARD,
    batch_size: int = 256,
    microbatch: int | None = None,
    constants: dict[str, dict[str, Any]] | None = None,
    state_dir: str | os.PathLike | None = None,
    programs: dict[Any, Callable[..., Any]] | None = None,
) -> Report:
    """Runs attacks in sequence on all local devices, each on the examples that are still robust.

    Every call traces and compiles logits_fn again, once for all batches. Calls that share
    `programs`, for example with other radii or images, compile once. An example's result depends
    only on its own key, image and label. Call it outside of `jax.jit` and of a mesh.

    Args:
      key: one random key.
      logits_fn: the classifier in evaluation mode, [b,H,W,C] -> [b,K]. It must be deterministic,
        return logits, and not mix examples. With fewer than four classes 'apgd-t' maximises the
        targets' margins, because the targeted DLR loss is not defined.
      x, y, epsilon, norm: as for `attacks.pgd`, with N examples.
      attacks: names from ATTACKS, in order.
      batch_size: examples per call, over all devices; rounded up to a multiple of their number.
      microbatch: examples computed at a time on a device. Broken examples cost nothing, but a
        microbatch is always full. None means at most 32 on CPUs and 128 elsewhere, fewer if the
        examples of an attack then fill it better and its program is not shared by `programs`.
      constants: keyword arguments of attacks by name, such as {'square': {'queries': 1000}}. The
        defaults are AutoAttack's; see `Report.name`.
      state_dir: folder for finished batches, from which the same call resumes.
      programs: a dict, initially empty, that caches compiled programs between calls with the same
        logits_fn.

    Returns:
      The report. Only examples whose image was checked after the attack to be in the ball and the
      box and to be misclassified count as broken.

    Raises:
      UserError: an argument is out of range, the classifier returns probabilities, too few classes
        or logits that are not finite, or the folder belongs to another call, has a damaged file or
        cannot be created.
    """
    x, y, constants = checks.as_images(np.asarray(x)), np.asarray(y), constants or {}
    _check(key, logits_fn, x, y, epsilon, norm, attacks, batch_size, microbatch, constants)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(jnp.asarray(key), impl="threefry2x32")
    usual = 32 if jax.local_devices()[0].platform == "cpu" else 128
    fixed = microbatch is not None or programs is not None
    runner = _Runner(logits_fn, norm, min(batch_size, len(x)), microbatch or usual, programs)
    logits = runner.logits(x)
    warnings = _check_classifier(logits_fn, x, logits, attacks)
    if "apgd-t" in attacks and _finite_classes(logits) < 4:
        margins, own = {"loss": "margin-targeted"}, constants.get("apgd-t", {})
        constants = constants | {"apgd-t": margins | own}
    _check_constants(constants, attacks, norm, logits_fn, (runner.most, *x.shape[1:]))
    name, size = _name(attacks, constants), runner.batch_size
    state, logits = _open_state(
        state_dir, key, x, y, logits, epsilon, norm, attacks, constants, size
    )

    wrong = np.argmax(logits, -1) != y
    robust, images, broken_by = ~wrong, x.copy(), np.where(wrong, "clean", "").astype("<U16")
    accounts, clean_accuracy = [], float(np.mean(robust))
    for attack in attacks:
        remaining, totals, zero_gradients, not_finite = np.flatnonzero(robust), np.zeros(3), 0, 0
        examples = {"key": _example_keys(key, attack, len(x)), "x": x, "y": y.astype(np.int32)}
        impl = jax.random.key_impl(key)
        runner.microbatch = runner.most if fixed else runner.well_filled(len(remaining))
        run = functools.partial(runner.attack, attack, epsilon, constants.get(attack), impl)
        path = state and state / attack
        for indices, result in _in_batches(run, examples, remaining, size, path):
            broken = indices[result["broken"]]
            images[broken], robust[broken], broken_by[broken] = result["images"], False, attack
            totals += result["totals"]
            zero_gradients += int(result["zero_gradients"])
            not_finite += int(result["not_finite"])
        account = _account(attack, remaining, robust, totals)
        accounts.append(account)
        warnings += _warn_about(account, accounts[:-1], clean_accuracy, zero_gradients, not_finite)
        logging.info("%s", account)
    return Report(
        name=name,
        norm=norm,
        epsilon=float(epsilon),
        images=images,
        robust=robust,
        broken_by=broken_by,
        clean_accuracy=clean_accuracy,
        robust_accuracy=float(np.mean(robust)),
        accounts=accounts,
        warnings=warnings,
    )


# ------------------------------------------------------------------------ batches on devices


class _Runner:
    """Runs the classifier and the attacks on batches of one size, split over all local devices."""

    def __init__(
        self,
        logits_fn: LogitsFn,
        norm: str,
        batch_size: int,
        microbatch: int,
        programs: dict[Any, Callable[..., Any]] | None,
    ):
        devices = jax.local_device_count()
        self.batch_size = -(-batch_size // devices) * devices
        self.logits_fn, self.norm = logits_fn, norm
        self.most = self.microbatch = min(microbatch, self.batch_size // devices)
        self._programs = {} if programs is None else programs

    def well_filled(self, examples: int) -> int:
        """The smallest microbatch, a multiple of 4, that needs no more groups than the largest."""
        of_device = max(-(-min(examples, self.batch_size) // jax.local_device_count()), 1)
        groups = -(-of_device // self.most)
        return min(-(-of_device // (4 * groups)) * 4, self.most)

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Logits [N,K] of images [N,H,W,C]."""
        parts = np.split(x, range(self.batch_size, len(x), self.batch_size))

        def classify(batch):
            # With the attacks' microbatch, for the same rounding.
            logits = loops.logits_of(self.logits_fn, batch["x"], batch["mask"], self.microbatch)
            return {"logits": logits}

        return np.concatenate([self._call("", classify, {"x": p})["logits"] for p in parts])

    def attack(
        self, name: str, epsilon: float, constants: dict[str, Any] | None, impl: Any, batch: Arrays
    ) -> Arrays:
        """Attacks one batch ('key', 'x' and 'y' of at most batch_size examples) and checks it.

        'key' is the data of keys of the implementation `impl`.

        Returns:
          'broken' [b], the 'images' of the broken examples, 'totals' (passes forward, passes
          backward, seconds), and the numbers of starts with 'zero_gradients' and of broken examples
          whose logits are 'not_finite'.
        """
        started = time.monotonic()

        def attack(batch, epsilon):
            images, info = _ATTACKS[name](
                jax.random.wrap_key_data(batch["key"], impl=impl),
                self.logits_fn,
                batch["x"],
                batch["y"],
                epsilon,
                norm=self.norm,
                mask=batch["mask"],
                microbatch=self.microbatch,
                **(constants or {}),
            )
            none = jnp.zeros(len(images), jnp.int32)
            out = {"images": images, "forward": info["forward"]}
            return out | {n: info.get(n, none) for n in ("backward", "zero_gradient")}

        out = self._call(f"{name} {constants}", attack, batch, np.float32(epsilon))
        logits = self.logits(out["images"])
        not_finite = np.asarray(checks.not_finite(logits))
        wrong = (np.argmax(logits, -1) != batch["y"]) | not_finite
        broken = wrong & _within(out["images"], batch["x"], epsilon, self.norm)
        passes = [out[name].sum(dtype=np.int64) for name in ("forward", "backward")]
        return {
            "broken": broken,
            "images": out["images"][broken],
            "totals": np.array([*passes, time.monotonic() - started]),
            "zero_gradients": out["zero_gradient"].sum(),
            "not_finite": (broken & not_finite).sum(),
        }

    def _call(self, name: str, function: Callable, batch: Arrays, *args: Any) -> Arrays:
        """Maps a function over the devices, on a batch padded to the batch size.

        `name` identifies it in the cache of programs; `args` are equal on all devices.
        """
        # Examples are assigned to devices in turn, so that a few examples keep all devices busy.
        devices = jax.local_device_count()
        index = np.arange(len(batch["x"]))
        slot = index % devices * (self.batch_size // devices) + index // devices
        source, mask = np.zeros(self.batch_size, int), np.zeros(self.batch_size, bool)
        source[slot], mask[slot] = index, True
        padded = shard({name: a[source] for name, a in batch.items()} | {"mask": mask})
        # `function` is a new object in each call, which pmap would compile again.
        mapped = jax.pmap(function, AXIS, in_axes=(0, *[None] * len(args)))
        program = self._programs.setdefault((name, self.norm, self.microbatch), mapped)
        out = program(padded, *args)
        return {name: np.asarray(a).reshape(-1, *a.shape[2:])[slot] for name, a in out.items()}


def _example_keys(key: jax.Array, attack: str, count: int) -> np.ndarray:
    """Data [N,...] of all examples' keys for one attack, whatever the batches and devices."""
    key = jax.random.fold_in(key, ATTACKS.index(attack))
    return np.asarray(jax.random.key_data(keys.of_positions(key, 0, count)))


def _within(images: np.ndarray, x: np.ndarray, epsilon: float, norm: str) -> np.ndarray:
    """Whether images [N,H,W,C] are in the ball and in the box, computed in float64."""
    delta = (images.astype(np.float64) - x).reshape(len(x), -1)
    distance = np.abs(delta).max(-1) if norm == "linf" else np.sqrt(np.sum(delta**2, -1))
    flat = images.reshape(len(x), -1)
    return (distance <= epsilon + _TOLERANCE * (1 + epsilon)) & np.all(
        (flat >= 0) & (flat <= 1), -1
    )


# ------------------------------------------------------------------------ the report


def _account(attack: str, indices: np.ndarray, robust: np.ndarray, totals: np.ndarray) -> Account:
    return Account(
        attack=attack,
        attacked=len(indices),
        broken=int(len(indices) - robust[indices].sum()),
        robust_accuracy=float(np.mean(robust)),
        forward=int(totals[0]),
        backward=int(totals[1]),
        seconds=float(totals[2]),
    )


def _name(attacks: Sequence[str], constants: dict[str, dict[str, Any]]) -> str:
    if set(STANDARD) <= set(attacks) and not set(STANDARD) & set(constants):
        return "+".join(["AutoAttack", *(name for name in attacks if name not in STANDARD)])
    return f"partial: {'+'.join(attacks)}"


def _warn_about(
    account: Account,
    before: list[Account],
    clean_accuracy: float,
    zero_gradients: int,
    not_finite: int,
) -> list[str]:
    """Warns about signs of masked gradients and about logits that are not finite."""
    found = []
    if not_finite:
        found.append(
            f"{account.attack} broke {not_finite} examples with images for which the classifier "
            "returns NaN or infinity: check its weights."
        )
    if zero_gradients:
        found.append(
            f"{account.attack} had a gradient of zero at {zero_gradients} starts: gradient-based "
            "attacks are unreliable here."
        )
    gain = (before[-1].robust_accuracy if before else clean_accuracy) - account.robust_accuracy
    if account.attack == "square" and before and gain > 0.002:
        found.append(
            f"Square, which uses no gradients, still broke {gain:.2%} of the examples: the "
            "gradients may be masked, so try more queries or an adaptive attack."
        )
    for sentence in found:
        logging.warning("%s", sentence)
    return found


# ------------------------------------------------------------------------ checks


def _check(key, logits_fn, x, y, epsilon, norm, attacks, batch_size, microbatch, constants) -> None:
    if not keys.is_single(key):
        raise UserError("The key is an array of several keys: give a single one.")
    loops.check(epsilon, norm)
    checks.check_integers(1, batch_size=batch_size, microbatch=microbatch or 1)
    few = min(microbatch or batch_size, len(x))
    checks.check_labels(y, x, logits_fn, few)
    for name in (*attacks, *constants):
        if name not in ATTACKS:
            raise UserError(f"The attack {name!r} is unknown: choose from {', '.join(ATTACKS)}.")
    if not attacks or len(set(attacks)) < len(attacks):
        raise UserError(f"attacks={attacks!r} must name at least one attack, each of them once.")
    for name, given in constants.items():
        if not isinstance(given, dict):
            raise UserError(f"constants[{name!r}]={given!r} must be a dict of arguments.")
        taken = inspect.signature(_ATTACKS[name]).parameters.values()
        known = {p.name for p in taken if p.kind == p.KEYWORD_ONLY} - {"norm", "mask", "microbatch"}
        if unknown := sorted(set(given) - known):
            raise UserError(
                f"constants[{name!r}] has the unknown argument {unknown[0]!r}: choose from "
                f"{', '.join(sorted(known))}."
            )
    checks.float32_logits(logits_fn, x[:few], gradients=set(attacks) != {"square"})


def _check_constants(constants, attacks, norm, logits_fn, shape) -> None:
    """Raises UserError for a value that its attack does not take, before any attack is run."""
    batch = (
        jax.eval_shape(jax.random.key, 0),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct(shape[:1], jnp.int32),
    )
    for name in set(attacks) & set(constants):
        attack = functools.partial(_ATTACKS[name], epsilon=0.1, norm=norm, **constants[name])
        try:
            jax.eval_shape(lambda key, x, y, attack=attack: attack(key, logits_fn, x, y), *batch)
        except UserError as error:
            raise UserError(f"constants[{name!r}]: {error}") from error


def _check_classifier(
    logits_fn: LogitsFn, x: np.ndarray, logits: np.ndarray, attacks: Sequence[str]
) -> list[str]:
    """Raises UserError for classifiers that cannot be attacked; returns warnings about others."""
    classes, found = _finite_classes(logits), []
    checks.check_finite(int(checks.not_finite(logits).sum()), len(x), "clean images")
    if classes < 2:
        raise UserError("An image has one finite logit: two classes or more must have finite ones.")
    if "apgd-dlr" in attacks and classes < 3:
        raise UserError(
            f"The DLR loss needs at least 3 classes and the classifier has {classes}: remove "
            "'apgd-dlr' from `attacks`."
        )
    if "apgd-t" in attacks and classes < 4:
        found.append(
            f"The targeted DLR loss needs at least 4 classes and the classifier has {classes}: "
            "apgd-t maximises the targets' margins instead, unlike the published AutoAttack."
        )
    sums_to_one = np.all(np.abs(logits.sum(-1) - 1) < 0.01)  # Also of bfloat16.
    if logits.min() >= 0 and logits.max() <= 1 and sums_to_one:
        raise UserError("The classifier returns probabilities: make it return logits.")
    # Traced twice, because randomness may also be drawn at tracing.
    few = jnp.asarray(x[:32])
    first, second = (np.float32(jax.jit(lambda a: logits_fn(a))(few)) for _ in range(2))
    first, second = (np.where(a == -np.inf, 0, a) for a in (first, second))
    scale = np.linalg.norm(first, axis=-1) + 1e-10
    if np.any(np.linalg.norm(first - second, axis=-1) > 1e-4 * scale):
        found.append(
            "The classifier is random (two passes differ), so AutoAttack's result is unreliable."
        )
    for sentence in found:
        logging.warning("%s", sentence)
    return found


def _finite_classes(logits: np.ndarray) -> int:
    """The number of classes that an image has at least; a logit of -inf excludes its class."""
    return int(np.isfinite(logits).sum(-1).min())


# ------------------------------------------------------------------------ finished batches on disk


def _open_state(state_dir, key, x, y, logits, epsilon, norm, attacks, constants, batch_size) -> Any:
    """Opens the folder of finished batches; returns it and the clean logits of the first call.

    Raises:
      UserError: the folder belongs to another call.
    """
    if state_dir is None:
        return None, logits
    folder = paths.at(state_dir)
    data = hashlib.sha256()
    for array in (jax.random.key_data(key), x, y):
        data.update(np.ascontiguousarray(array).tobytes())
    settings = {
        "epsilon": float(epsilon),
        "norm": norm,
        "attacks": list(attacks),
        "constants": constants,
        "batch_size": batch_size,
        "data": data.hexdigest(),
    }
    settings = json.dumps(settings, sort_keys=True, default=float)
    start = folder / "start.npz"
    if paths.exists(start):
        known = _read(start)
        # Approximately, because the folder may have been written on other devices.
        same = known["logits"].shape == logits.shape and np.allclose(
            known["logits"], logits, rtol=1e-3, atol=1e-3
        )
        if str(known["settings"]) != settings or not same:
            raise UserError(
                f"The folder {folder} holds attacks on another classifier, or with other settings, "
                "keys, images or numbers of devices: use another folder, or delete it."
            )
        logits = known["logits"]  # The stored batches depend on which examples these get right.
    else:
        try:
            paths.make_folder(folder)
        except OSError as error:
            raise UserError(
                f"state_dir={str(folder)!r} cannot be created ({error.strerror}): use another "
                "folder."
            ) from error
        _write(start, {"settings": np.array(settings), "logits": logits})
    return folder, logits


def _in_batches(
    run: Callable[[Arrays], Arrays], examples: Arrays, indices: np.ndarray, size: int, path: Any
) -> Iterator[tuple[np.ndarray, Arrays]]:
    """Runs the examples at `indices`, `size` at a time; yields their indices and results."""
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        batch = {name: a[part] for name, a in examples.items()}
        file = path and path.with_name(f"{path.name}_{start:07d}.npz")
        yield part, _cached(file, functools.partial(run, batch))


def _cached(path: Any, compute: Callable[[], Arrays]) -> Arrays:
    """Reads the result from a file, or computes it and writes it there if there is a path."""
    if path and paths.exists(path):
        return _read(path)
    result = compute()
    if path:
        _write(path, result)
    return result


def _write(path: paths.AnyPath, arrays: Arrays) -> None:
    """Writes an .npz file atomically."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    paths.write(path, content.getvalue())


def _read(path: paths.AnyPath) -> Arrays:
    try:
        with np.load(io.BytesIO(paths.read(path)), allow_pickle=False) as file:
            return dict(file)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}): delete it, and the same call computes it "
            "again."
        ) from error
