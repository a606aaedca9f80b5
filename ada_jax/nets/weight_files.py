"""Weights as safetensors files, which cannot execute code."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ada_jax import paths
from ada_jax.errors import UserError

FORMAT = 1


Tree = Any  # A pytree of arrays.
_SEPARATOR = "//"
_OWN_METADATA = ("format", "digest", "metadata_digest")
# The dtypes that safetensors' NumPy reader preserves.
_WEIGHT_DTYPES = frozenset(
    {"bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"}
    | {"float16", "bfloat16", "float32", "float64", "complex64"}
)


def digest(tree: Tree) -> str:
    """SHA-256, in hex, of the sorted names, shapes, dtypes and bytes of a tree's arrays.

    Raises:
      UserError: a key of the tree cannot be part of a name, see `named`.
    """
    return state_digest(host_arrays(tree))


def save_weights(path: str | os.PathLike, tree: Tree, metadata: Mapping[str, Any]) -> str:
    """Writes weights atomically as one safetensors file.

    The file's metadata are `format`, `digest`, `metadata_digest` and the given fields, each as
    JSON.

    Args:
      path: the file to write or replace, local or gs://...; missing folders are created.
      tree: pytree of finite arrays, which `load_weights` returns as nested dicts.
      metadata: JSON values that a reader needs, such as the classifier and the number of classes.

    Returns:
      The `digest` of the tree.

    Raises:
      UserError: an array is not finite, a dtype, key or metadata field cannot be stored, or the
        file cannot be written.
    """
    import safetensors.numpy

    path = os.fspath(path)
    flat = host_arrays(tree)
    for name, array in flat.items():
        if array.dtype.name not in _WEIGHT_DTYPES:
            raise UserError(
                f"The weights for {path} were not written because '{name}' has dtype "
                f"{array.dtype.name}, which safetensors does not support: convert it to float32."
            )
    if bad := _first_not_finite(flat):
        raise UserError(
            f"The weights for {path} were not written because '{bad}' holds NaN or infinity: "
            "lower the learning rate or go back to an earlier checkpoint."
        )
    if taken := sorted(set(metadata) & set(_OWN_METADATA)):
        raise UserError(f"The metadata field '{taken[0]}' for {path} is reserved: rename it.")
    tree_digest = state_digest(flat)
    fields = {**metadata, "format": FORMAT, "digest": tree_digest}
    fields["metadata_digest"] = json_digest(fields)
    encoded = {name: json.dumps(value, allow_nan=False) for name, value in fields.items()}
    write_file(path, safetensors.numpy.save(flat, encoded))
    return tree_digest


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file atomically, and its folder.

    Raises:
      UserError: it cannot be written.
    """
    try:
        paths.make_folder(os.path.dirname(path) or ".")
        paths.write(path, content)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): free some space, or give "
            "another file."
        ) from error


def load_weights(
    path: str | os.PathLike, like: Tree | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads and verifies weights written by `save_weights`.

    With `like`, safetensors files of other programs are read too; they have no digest, so only
    names, shapes and finiteness are verified.

    Args:
      path: the safetensors file, local or gs://...
      like: pytree of arrays or `jax.ShapeDtypeStruct` with the names and shapes that the file must
        have. Floating-point arrays are converted to its dtypes.

    Returns:
      The weights as nested dicts of NumPy arrays and the metadata given to `save_weights`.

    Raises:
      UserError: the file is missing or damaged, written by another program (without `like`), not
        finite, or does not match `like`.
    """
    path = os.fspath(path)
    paths.check_bucket(f"The weights file {path}", path)
    if not paths.exists(path):
        raise UserError(f"There is no weights file {path}: check the path.")
    flat, fields = read_safetensors(path)
    foreign = _is_foreign(fields)
    if foreign and like is not None:
        fields = {}
    else:
        _check_digests(path, flat, fields)
    given = {name: value for name, value in fields.items() if name not in _OWN_METADATA}
    if like is not None:
        wanted = {name: shape(leaf) for name, leaf in named(like).items()}
        found = {name: shape(array) for name, array in flat.items()}
        if difference := first_difference(found, wanted):
            other = ", or import PyTorch's with python -m ada_jax.import_weights" if foreign else ""
            raise UserError(
                f"The weights file {path} does not fit this network ({difference}): give a file "
                f"of this architecture, or configure the architecture of the file{other}."
            )
        flat = {name: _as_floating(flat[name], leaf) for name, leaf in named(like).items()}
    if bad := _first_not_finite(flat):
        raise UserError(
            f"The weights file {path} holds NaN or infinity in '{bad}': use another file."
        )
    return nested(flat), given


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata given to `save_weights`; {} for a file of another program.

    Raises:
      UserError: the file is missing or damaged.
    """
    path = os.fspath(path)
    return {} if _is_foreign(read_safetensors(path)[1]) else load_weights(path)[1]


def _is_foreign(fields: Mapping[str, Any]) -> bool:
    """Whether another program wrote a file: it has no digests and no integer as format."""
    without_digest = not fields.keys() & {"digest", "metadata_digest"}
    return without_digest and not isinstance(fields.get("format"), int)


def _check_digests(path: str, flat: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> None:
    """Checks that `save_weights` wrote a file and that its content matches its digests."""
    if fields.get("format") != FORMAT:
        raise UserError(
            f"The file {path} is not a weights file of this version of ada_jax (its format is "
            f"{fields.get('format')}, not {FORMAT}): save it again with "
            "ada_jax.nets.weight_files.save_weights, or use a network trained elsewhere in your "
            "own training loop, with ada_jax.adversarial_augment."
        )
    covered = {name: value for name, value in fields.items() if name != "metadata_digest"}
    digests = {"metadata_digest": json_digest(covered), "digest": state_digest(flat)}
    if any(fields.get(name) != digest for name, digest in digests.items()):
        raise UserError(
            f"The weights file {path} is damaged (its content does not match its sha256): "
            "copy it or save it again."
        )


def named(tree: Tree) -> dict[str, Any]:
    """The leaves by name, in the order of `jax.tree.leaves`.

    Raises:
      UserError: a key is empty or has a separator, or two leaves have the same name.
    """
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        name = _SEPARATOR.join(keys)
        # '__metadata__' is safetensors' entry for its metadata.
        if not keys or not all(map(_is_storable, keys)) or name in named or name == "__metadata__":
            raise UserError(
                f"An array of the tree cannot be stored under the name '{name}': use non-empty, "
                f"distinct keys that neither hold '{_SEPARATOR}' nor start or end with '/'."
            )
        named[name] = leaf
    return named


def _is_storable(key: str) -> bool:
    return bool(key) and _SEPARATOR not in key and key == key.strip("/")


def nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts a flat dict of names with separators to nested dicts."""
    tree: dict[str, Any] = {}
    for name, array in flat.items():
        *keys, last = name.split(_SEPARATOR)
        node = tree
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = array
    return tree


def host_arrays(tree: Tree) -> dict[str, np.ndarray]:
    """Copies of the leaves by name, contiguous and in native byte order."""
    flat = {}
    for name, leaf in named(tree).items():
        array = np.asarray(leaf)
        flat[name] = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return flat


def state_digest(flat: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays with their names, dtypes and shapes."""
    sha = hashlib.sha256()
    for name, array in sorted(flat.items()):
        sha.update(f"{json.dumps(name)} {spec(array)}\n".encode())
        sha.update(array.reshape(-1).view(np.uint8))
    return sha.hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    # Written and read once, because JSON changes tuples and integer keys.
    stored = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


def shape(leaf: Any) -> str:
    """The shape of a leaf, such as '[3,3]'."""
    return f"[{','.join(map(str, np.shape(leaf)))}]"


def spec(leaf: Any) -> str:
    """Dtype and shape of an array, a ShapeDtypeStruct or a number, such as 'float32[3,3]'."""
    return f"{_dtype(leaf).name}{shape(leaf)}"


def _dtype(leaf: Any) -> np.dtype:
    return np.dtype(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)


def _as_floating(array: np.ndarray, like: Any) -> np.ndarray:
    """Converts the array to the type of `like` if both are floating point."""
    types = array.dtype, _dtype(like)
    if not all(jnp.issubdtype(t, jnp.floating) for t in types):
        return array
    with np.errstate(over="ignore"):  # Infinities are reported by the caller.
        return array.astype(types[1])


def struct(spec: str) -> jax.ShapeDtypeStruct:
    """The inverse of `spec`."""
    dtype, _, sides = spec.rstrip("]").partition("[")
    return jax.ShapeDtypeStruct([int(n) for n in sides.split(",") if n], dtype)


def _first_not_finite(flat: Mapping[str, np.ndarray]) -> str | None:
    return next((name for name, array in flat.items() if not np.isfinite(array).all()), None)


def first_difference(found: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """Describes the difference between two dicts {name: shape}; None if they are equal."""
    names = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if not names:
        return None
    first = names[0]
    if first not in found:
        what = f"is missing, expected {wanted[first]}"
    elif first not in wanted:
        what = f"of {found[first]} is unexpected"
    else:
        what = f"is {found[first]}, expected {wanted[first]}"
    return f"{len(names)} of {len({*found, *wanted})} arrays differ; the first, '{first}', {what}"


def one_line(error: Exception) -> str:
    """An error's message on one line; the middle of a long one is left out."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:60]} ... {text[-135:]}"


def read_safetensors(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the arrays of any program's safetensors file by name, and its metadata.

    Metadata values that are not JSON are returned as strings.

    Raises:
      UserError: it is not a readable safetensors file.
    """
    import safetensors

    try:
        with (
            paths.local_copy(path) as copy,
            safetensors.safe_open(copy, framework="np") as file,
        ):
            fields = {name: _from_json(text) for name, text in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, fields  # noqa: SIM118
    except Exception as error:  # Damaged bytes raise errors of many types.
        raise UserError(
            f"The file {path} is not a complete safetensors file ({one_line(error)}): "
            "copy it again, or save it with ada_jax.nets.weight_files.save_weights "
            "(pickles are not supported)."
        ) from error


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
