"""AutoAttack: four attacks in sequence, each on what the ones before left unbroken, and its books.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks" (2020), section 5, its 'standard' version.
"""

import dataclasses
import functools
import hashlib
import inspect
import io
import json
import os
import time
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
from ada_jax.errors import UserError
from ada_jax.sharding import AXIS, shard

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
# In the order of their keys: an attack draws the same whatever ran before it.
_ATTACKS: dict[str, Callable] = {
    "apgd-ce": functools.partial(apgd, loss="ce"),
    "apgd-t": functools.partial(apgd, loss="dlr-targeted"),
    "fab-t": functools.partial(fab, search_steps=0),
    "square": square,
    "apgd-dlr": functools.partial(apgd, loss="dlr"),
    "multitargeted": multitargeted,
}
ATTACKS = tuple(_ATTACKS)
# Rounding in an attack may leave an image as far outside of its ball.
_TOLERANCE = 1e-6

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class Account:
    """What one attack did.

    Attributes:
      attack: its name, of ATTACKS.
      attacked: how many examples it was given.
      broken: how many of them it broke.
      robust_accuracy: share of all examples still classified correctly after it, in [0,1].
      forward: passes through the classifier, counted in images; without the check of the results.
      backward: gradients of it, counted in images.
      seconds: wall-clock time, compilation included.
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
    """What a sequence of attacks found.

    Attributes:
      name: 'AutoAttack' if all four standard attacks ran with their own constants, with what ran
        besides them, as in 'AutoAttack+multitargeted'; else 'partial: apgd-ce+square' and so on.
      norm: 'linf' or 'l2'.
      epsilon: radius, in units of pixels.
      images: [N,H,W,C] in [0,1], the misclassified image where an attack found one, else x.
      robust: bool [N], classified correctly, and by no attack broken.
      broken_by: [N], the attack's name, 'clean' where x itself is misclassified, '' where robust.
      clean_accuracy: share of examples classified correctly without an attack.
      robust_accuracy: share of examples that are robust.
      accounts: one per attack, in order.
      warnings: sentences that say why the result may be unreliable.
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
    """Runs attacks one after the other on all local devices, each on what is still robust.

    Every call traces and compiles logits_fn anew, once for all batches, and so attacks it as it is
    now. Calls that share `programs` compile once: for other radii or images, say. An example's
    result depends on its own key, image and label only.

    Args:
      key: one random key.
      logits_fn: the classifier in evaluation mode, [b,H,W,C] -> [b,K]: deterministic, not mixing
        examples, returning logits; closed over its parameters. With fewer than four classes
        'apgd-t' ascends the targets' margins, as the targeted DLR loss is not defined.
      x: images [N,H,W,C] of any floating type, in [0,1].
      y: labels [N], int in [0,K).
      epsilon: the ball's radius, positive, in units of pixels.
      norm: 'linf' or 'l2'.
      attacks: names of ATTACKS, in order.
      batch_size: examples per call, over all devices; rounded up to a multiple of them.
      microbatch: examples computed at a time on a device; broken examples cost nothing, but a
        microbatch is always filled up. None takes 32 on CPUs and 128 elsewhere.
      constants: keyword arguments for attacks by name, such as {'square': {'queries': 1000}};
        AutoAttack's own are the defaults, and with others the report is called partial.
      state_dir: folder to keep finished batches in; the same call goes on with what is not there.
      programs: a dict, empty at first, that keeps compiled programs from call to call, for a
        logits_fn that has not changed in between, and neither have `constants`.

    Returns:
      The report. Of 'robust' only what was checked after the attack, inside the ball and the box
      and misclassified, is taken away.

    Raises:
      UserError: an argument is out of range, the classifier returns probabilities, has too few
        classes or gives no numbers, or the folder belongs to another call.
    """
    x, y, constants = checks.as_images(np.asarray(x)), np.asarray(y), constants or {}
    _check(key, logits_fn, x, y, epsilon, norm, attacks, batch_size, microbatch, constants)
    usual = 32 if jax.local_devices()[0].platform == "cpu" else 128
    runner = _Runner(logits_fn, norm, min(batch_size, len(x)), microbatch or usual, programs)
    logits = runner.logits(x)
    warnings = _check_classifier(logits_fn, x, logits, attacks)
    if "apgd-t" in attacks and logits.shape[-1] < 4:
        margins, own = {"loss": "margin-targeted"}, constants.get("apgd-t", {})
        constants = constants | {"apgd-t": margins | own}
    name, size = _name(attacks, constants), runner.batch_size
    state, logits = _open_state(
        state_dir, key, x, y, logits, epsilon, norm, attacks, constants, size
    )

    wrong = np.argmax(logits, -1) != y
    robust, images, broken_by = ~wrong, x.copy(), np.where(wrong, "clean", "").astype("<U16")
    accounts, clean_accuracy = [], float(np.mean(robust))
    for attack in attacks:
        todo, totals, zero_gradients, not_finite = np.flatnonzero(robust), np.zeros(3), 0, 0
        examples = {"key": _example_keys(key, attack, len(x)), "x": x, "y": y.astype(np.int32)}
        run = functools.partial(runner.attack, attack, epsilon, constants.get(attack))
        for place, result in _in_batches(run, examples, todo, size, state and state / attack):
            hit = place[result["broken"]]
            images[hit], robust[hit], broken_by[hit] = result["images"], False, attack
            totals += result["totals"]
            zero_gradients += int(result["zero_gradients"])
            not_finite += int(result.get("not_finite", 0))  # Older folders lack it.
        account = _account(attack, todo, robust, totals)
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
        self.microbatch = min(microbatch, self.batch_size // devices)
        self._programs = {} if programs is None else programs

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Logits [N,K] of any number of images."""
        parts = np.split(x, range(self.batch_size, len(x), self.batch_size))

        def classify(batch):
            # With the attacks' microbatch, and so their rounding.
            logits = loops.logits_of(self.logits_fn, batch["x"], batch["mask"], self.microbatch)
            return {"logits": logits}

        return np.concatenate([self._call("", classify, {"x": p})["logits"] for p in parts])

    def attack(
        self, name: str, epsilon: float, constants: dict[str, Any] | None, batch: Arrays
    ) -> Arrays:
        """Attacks one batch, 'key', 'x' and 'y' of at most batch_size examples, and checks it.

        Returns:
          Which examples are 'broken' [b], the broken ones' 'images', the 'totals' (passes forward,
          passes backward, seconds), how many starts had 'zero_gradients', and how many broken
          examples' logits are 'not_finite'.
        """
        started = time.monotonic()

        def attack(batch, epsilon):
            images, info = _ATTACKS[name](
                batch["key"],
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

        out = self._call(name, attack, batch, np.float32(epsilon))
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
        """Calls a function of this name on a batch filled up to the batch size; cuts its results.

        It is mapped over the devices; `args`, such as epsilon, are the same on all.
        """
        # Examples are dealt out to the devices in turn, so that a few keep all of them busy.
        devices = jax.local_device_count()
        number = np.arange(len(batch["x"]))
        place = number % devices * (self.batch_size // devices) + number // devices
        source, mask = np.zeros(self.batch_size, int), np.zeros(self.batch_size, bool)
        source[place], mask[place] = number, True
        filled = shard({name: a[source] for name, a in batch.items()} | {"mask": mask})
        # `function` is a new one at each call, and would be compiled at each.
        mapped = jax.pmap(function, AXIS, in_axes=(0, *[None] * len(args)))
        program = self._programs.setdefault((name, self.norm, self.microbatch), mapped)
        out = program(filled, *args)
        return {name: np.asarray(a).reshape(-1, *a.shape[2:])[place] for name, a in out.items()}


def _example_keys(key: jax.Array, attack: str, count: int) -> np.ndarray:
    """Raw keys from the examples' places among all: batches and devices do not matter."""
    key = jax.random.fold_in(key, ATTACKS.index(attack))
    return np.asarray(_key_data(keys.of_positions(key, 0, count)))


def _key_data(key: jax.Array) -> jax.Array:
    """The numbers of a typed key; a raw one as it is."""
    return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key


def _within(images: np.ndarray, x: np.ndarray, epsilon: float, norm: str) -> np.ndarray:
    """Whether images are in the ball and in the box [N], in double precision."""
    delta = (images.astype(np.float64) - x).reshape(len(x), -1)
    distance = np.abs(delta).max(-1) if norm == "linf" else np.sqrt(np.sum(delta**2, -1))
    flat = images.reshape(len(x), -1)
    return (distance <= epsilon + _TOLERANCE) & np.all((flat >= 0) & (flat <= 1), -1)


# ------------------------------------------------------------------------ books


def _account(attack: str, todo: np.ndarray, robust: np.ndarray, totals: np.ndarray) -> Account:
    return Account(
        attack=attack,
        attacked=len(todo),
        broken=int(len(todo) - robust[todo].sum()),
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
    """Signs that an attack's gradients, those of the attacks before it, or logits misled it."""
    found = []
    if not_finite:
        found.append(
            f"{account.attack} broke {not_finite} examples by images for which the classifier "
            "returns NaN or infinity: check its weights."
        )
    if zero_gradients:
        found.append(
            f"{account.attack} met {zero_gradients} starts with a gradient of zero: attacks by "
            "gradients are unreliable here."
        )
    gain = (before[-1].robust_accuracy if before else clean_accuracy) - account.robust_accuracy
    if account.attack == "square" and before and gain > 0.002:
        found.append(
            f"Square, which uses no gradients, still broke {gain:.2%} of the examples: the "
            "gradients may be masked, so try more of its queries or an adaptive attack."
        )
    for sentence in found:
        logging.warning("%s", sentence)
    return found


# ------------------------------------------------------------------------ checks


def _check(key, logits_fn, x, y, epsilon, norm, attacks, batch_size, microbatch, constants) -> None:
    keys.check(key)
    if np.size(_key_data(key)) != np.size(_key_data(jax.random.key(0))):
        raise UserError("There are several keys: give one, from which every image gets its own.")
    loops.check(epsilon, norm)
    checks.check_integers(1, batch_size=batch_size, microbatch=microbatch or 1)
    few = min(microbatch or batch_size, len(x))
    checks.check_labels(y, x, logits_fn, few)
    if isinstance(attacks, str):
        raise UserError(f"attacks={attacks!r} is one name: give several, as ({attacks!r},).")
    for name in (*attacks, *constants):
        if name not in ATTACKS:
            raise UserError(f"The attack {name!r} is unknown: choose among {', '.join(ATTACKS)}.")
    if not attacks or len(set(attacks)) < len(attacks):
        raise UserError(f"attacks={attacks!r} must name at least one attack, and each only once.")
    for name, given in constants.items():
        taken = inspect.signature(_ATTACKS[name]).parameters.values()
        known = {p.name for p in taken if p.kind == p.KEYWORD_ONLY} - {"norm", "mask", "microbatch"}
        if unknown := sorted(set(given) - known):
            raise UserError(
                f"constants[{name!r}] has {unknown[0]!r}: choose among {', '.join(sorted(known))}."
            )
    checks.float32_logits(logits_fn, x[:few], gradients=set(attacks) != {"square"})


def _check_classifier(
    logits_fn: LogitsFn, x: np.ndarray, logits: np.ndarray, attacks: Sequence[str]
) -> list[str]:
    """Refuses a classifier that cannot be attacked; returns warnings about one that may not."""
    classes, found = logits.shape[-1], []
    checks.check_finite(int(checks.not_finite(logits).sum()), len(x), "clean images")
    if "apgd-dlr" in attacks and classes < 3:
        raise UserError(
            f"The DLR loss needs at least 3 classes and the classifier has {classes}: leave "
            "'apgd-dlr' out of `attacks`."
        )
    if "apgd-t" in attacks and classes < 4:
        found.append(
            f"The targeted DLR loss needs at least 4 classes and the classifier has {classes}: "
            "apgd-t ascends the targets' margins instead, which is not the published AutoAttack."
        )
    sums_to_one = np.all(np.abs(logits.sum(-1) - 1) < 1e-5)
    if logits.min() >= 0 and logits.max() <= 1 and sums_to_one:
        raise UserError("The classifier returns probabilities: the attacks need its logits.")
    # Traced twice, too: some randomness is drawn at tracing.
    few = jnp.asarray(x[:32])
    first, second = (np.float32(jax.jit(lambda a: logits_fn(a))(few)) for _ in range(2))
    scale = np.linalg.norm(first, axis=-1) + 1e-10
    if np.any(np.linalg.norm(first - second, axis=-1) > 1e-4 * scale):
        found.append(
            "The classifier is random: two passes differ, and AutoAttack's result is unreliable."
        )
    for sentence in found:
        logging.warning("%s", sentence)
    return found


# ------------------------------------------------------------------------ what is kept on disk


def _open_state(state_dir, key, x, y, logits, epsilon, norm, attacks, constants, batch_size) -> Any:
    """The folder for finished batches, found empty or to be of the same call; the first logits."""
    if state_dir is None:
        return None, logits
    folder = paths.at(state_dir)
    data = hashlib.sha256()
    for array in (_key_data(key), x, y):
        data.update(np.ascontiguousarray(array).tobytes())
    settings = {
        "epsilon": float(epsilon),
        "norm": norm,
        "attacks": list(attacks),
        "constants": constants,
        "batch_size": batch_size,
        "data": data.hexdigest(),
    }
    settings = json.dumps(settings, sort_keys=True)
    start = folder / "start.npz"
    if paths.exists(start):
        known = _read(start)
        # Not to the last bit: the folder may have come from other devices.
        same = known["logits"].shape == logits.shape and np.allclose(
            known["logits"], logits, rtol=1e-3, atol=1e-3
        )
        if str(known["settings"]) != settings or not same:
            raise UserError(
                f"The folder {folder} holds another classifier's attacks, or attacks with other "
                "settings, keys, images or numbers of devices: name another."
            )
        logits = known["logits"]  # The batches in the folder are of what these get right.
    else:
        try:
            paths.make_folder(folder)
        except OSError as error:
            raise UserError(
                f"state_dir={str(folder)!r} cannot be made a folder ({error.strerror}): name "
                "another."
            ) from error
        _write(start, {"settings": np.array(settings), "logits": logits})
    return folder, logits


def _in_batches(
    run: Callable[[Arrays], Arrays], examples: Arrays, todo: np.ndarray, size: int, path: Any
) -> Iterator[tuple[np.ndarray, Arrays]]:
    """Runs the examples to do, `size` at a time; gives their places and results."""
    for start in range(0, len(todo), size):
        place = todo[start : start + size]
        batch = {name: a[place] for name, a in examples.items()}
        file = path and path.with_name(f"{path.name}_{start:07d}.npz")
        yield place, _remembered(file, functools.partial(run, batch))


def _remembered(path: Any, compute: Callable[[], Arrays]) -> Arrays:
    """What the file holds, or else what is computed and written to it; without a path no file."""
    if path and paths.exists(path):
        return _read(path)
    result = compute()
    if path:
        _write(path, result)
    return result


def _write(path: paths.AnyPath, arrays: Arrays) -> None:
    """Writes a file whole or not at all."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    paths.write(path, content.getvalue())


def _read(path: paths.AnyPath) -> Arrays:
    with np.load(io.BytesIO(paths.read(path)), allow_pickle=False) as file:
        return dict(file)
