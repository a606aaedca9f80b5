"""Weights and checkpoints: what is read back is what was written, or a sentence says why not."""

import contextlib
import gc
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from ada_jax.errors import NotFiniteError, UserError
from ada_jax.nets import weight_files
from ada_jax.nets.weight_files import digest, load_weights, save_weights
from ada_jax.run.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]


DTYPES = ("float32", "bfloat16", "float16", "float64", "int8", "int32", "int64", "uint32", "bool")
WEIGHTS = {"net/~/conv": {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}, "b": np.ones(2)}
EXPECT = {"classifier": "resnet9", "theta_digest": "abc", "batch_size": 64}


class TrainState(NamedTuple):
    step: Any
    params: Any
    net_state: Any
    opt_state: Any


def make_state(seed: int, width: int = 5) -> TrainState:
    normal = np.random.default_rng(seed).normal
    params = {
        "net/~/conv_0": {"w": jnp.asarray(normal(size=(3, 3, 2, width)), jnp.float32)},
        "net/~/norm.1": {"scale": jnp.asarray(normal(size=width), jnp.bfloat16)},
    }
    net_state = {"empty": np.zeros((0, 3), np.float32), "key": np.array([seed, 7], np.uint32)}
    return TrainState(jnp.int32(seed), params, net_state, optax.adam(0.1).init(params))


@contextlib.contextmanager
def opened(workdir, keep=3):
    checkpoints = Checkpoints(workdir, keep)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def save_steps(workdir, *steps, keep=3):
    with opened(workdir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"expect": EXPECT, "seen": step * 10})


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def tear(folder):
    for path in files_of(folder):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        b = np.asarray(b)
        assert type(a) is np.ndarray
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def assert_one_sentence(error):
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message, message


keys = st.text("ab/~_.0é", min_size=1, max_size=6).filter(
    lambda key: key == key.strip("/") and "//" not in key
)


@st.composite
def arrays(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    values = np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape) * 50
    return np.asarray(values).astype(jnp.dtype(draw(st.sampled_from(DTYPES))))


trees = st.dictionaries(
    keys,
    st.recursive(arrays(), lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3)),
    max_size=4,
)


# Weights.


@settings(max_examples=60, deadline=None)
@given(tree=trees)
def test_weights_round_trip(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    metadata = {"classifier": "resnet9", "classes": 10, "clean_error": 0.1}
    returned = save_weights(path, tree, metadata)
    got, got_metadata = load_weights(path, like=tree)
    assert_same(got, tree)
    assert got_metadata == metadata
    assert returned == digest(tree) == digest(got)


def test_digest_depends_on_content_only():
    reference = digest({"a": {"w": np.arange(6.0)}, "b": np.zeros((2, 3), np.float32)})
    assert reference == digest({"b": jnp.zeros((2, 3)), "a": {"w": np.arange(12.0)[:6]}})
    assert reference == digest({"b": np.zeros((3, 2), ">f4").T, "a": {"w": np.arange(6.0)}})
    for other in (
        {"a": {"v": np.arange(6.0)}, "b": np.zeros((2, 3), np.float32)},
        {"a": {"w": np.arange(6.0)}, "b": np.zeros((3, 2), np.float32)},
        {"a": {"w": np.arange(6.0)}, "b": np.zeros((2, 3), np.int32)},
        {"a": {"w": -np.arange(6.0)}, "b": np.zeros((2, 3), np.float32)},
    ):
        assert digest(other) != reference


@pytest.mark.parametrize("key", ["", "a//b", "/a", "a/", "__metadata__"])
def test_keys_that_would_not_come_back_are_refused(tmp_path, key):
    with pytest.raises(UserError, match="cannot be stored under the name") as error:
        save_weights(tmp_path / "w", {key: np.ones(1)}, {})
    assert_one_sentence(error)


@pytest.mark.parametrize(
    "array",
    [np.array([1, np.nan]), jnp.array([jnp.inf], jnp.bfloat16), np.array(["text"])],
    ids=["nan", "inf", "dtype"],
)
def test_what_cannot_be_weights_leaves_the_old_file(tmp_path, array):
    path = tmp_path / "w.safetensors"
    save_weights(path, WEIGHTS, {})
    with pytest.raises(UserError, match="'a//w'") as error:
        save_weights(path, {"a": {"w": array}}, {})
    assert_one_sentence(error)
    assert_same(load_weights(path)[0], WEIGHTS)
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, WEIGHTS, {})

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left"):
        save_weights(path, {"other": np.ones(3)}, {})
    assert_same(load_weights(path)[0], WEIGHTS)
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_own_metadata_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="'digest'"):
        save_weights(tmp_path / "w", WEIGHTS, {"digest": "x"})


def test_weights_truncated_anywhere_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, WEIGHTS, {"classifier": "resnet9"})
    content = path.read_bytes()
    for length in {*range(0, len(content), 37), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"w\.safetensors") as error:
            load_weights(path)
        assert_one_sentence(error)


def test_weights_flipped_anywhere_are_refused_or_right(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, WEIGHTS, {"classifier": "resnet9", "classes": 10})
    content = path.read_bytes()
    passed = 0
    for position in range(len(content)):
        path.write_bytes(flip(content, position))
        try:
            tree, metadata = load_weights(path)
        except UserError:
            continue
        passed += 1
        assert_same(tree, WEIGHTS)
        assert metadata == {"classifier": "resnet9", "classes": 10}
    assert passed < 10  # Only padding and white space may differ.


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(WEIGHTS),
        b"",
        b"<html>404</html>",
        safetensors.numpy.save({"a": np.ones(2)}),
        safetensors.numpy.save({"a": np.ones(2)}, {"format": "pt"}),
        safetensors.numpy.save({"a": np.ones(2)}, {"format": "1"}),
        safetensors.numpy.save({"a": np.ones(2)}, {"format": "2"}),
    ],
    ids=["pickle", "empty", "html", "plain", "torch", "no digest", "newer"],
)
def test_foreign_weights_are_refused(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"w\.safetensors.* again") as error:
        load_weights(path)
    assert_one_sentence(error)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "np", "by": "1.2.3 a"}])
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
def test_weights_of_another_program_are_read_where_they_fit(tmp_path, metadata, dtype):
    path, like = tmp_path / "w.safetensors", {"a": {"w": np.ones((2, 3), np.float32)}, "n": 7}
    flat = {"a//w": np.full((2, 3), 1.5, dtype), "n": np.array(3, np.int32)}
    path.write_bytes(safetensors.numpy.save(flat, metadata))
    tree, got_metadata = load_weights(path, like)
    assert tree["a"]["w"].dtype == np.float32 and tree["n"].dtype == np.int32
    assert np.all(tree["a"]["w"] == 1.5) and tree["n"] == 3 and got_metadata == {}
    assert weight_files.metadata(path) == {}
    with pytest.raises(UserError, match=r"1 of 2 .* python -m ada_jax\.import_weights"):
        load_weights(path, {"a": {"w": np.ones((3, 2))}, "n": 7})


def test_foreign_weights_that_are_not_finite_are_refused(tmp_path):
    path, like = tmp_path / "w.safetensors", {"a": np.ones(2, np.float32)}
    for value in (np.nan, 1e300):  # too large for float32
        path.write_bytes(safetensors.numpy.save({"a": np.array([1, value])}, {"format": "pt"}))
        with pytest.raises(UserError, match="NaN or infinity in 'a'"):
            load_weights(path, like)


@pytest.mark.parametrize("fields", [{"digest": '"x"'}, {"metadata_digest": '"x"'}, {"format": "2"}])
def test_our_weights_with_a_damaged_digest_are_rejected(tmp_path, fields):
    path, like = tmp_path / "w.safetensors", {"a": np.ones(2)}
    path.write_bytes(safetensors.numpy.save(like, {"format": "pt"} | fields))
    with pytest.raises(UserError, match=r"w\.safetensors.* again"):
        load_weights(path, like)


def test_own_weights_are_converted_to_the_wanted_type_after_they_are_verified(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, {"w": np.float16([0.5, 2]), "n": np.int64([1])}, {"classes": 2})
    like = {"w": np.zeros(2, np.float32), "n": np.zeros(1, np.float32)}
    tree, metadata = load_weights(path, like)
    assert (tree["w"].dtype, tree["n"].dtype, metadata) == (np.float32, np.int64, {"classes": 2})
    assert load_weights(path)[0]["w"].dtype == np.float16


def test_missing_weights(tmp_path):
    with pytest.raises(UserError, match="no weights file"):
        load_weights(tmp_path / "none")


def test_nan_in_a_well_formed_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    with monkeypatch.context() as unchecked:
        unchecked.setattr(weight_files, "_first_not_finite", lambda flat: None)
        save_weights(path, {"a": np.array([np.nan])}, {})
    with pytest.raises(UserError, match="NaN or infinity in 'a'"):
        load_weights(path)


@pytest.mark.parametrize(
    "like, says",
    [
        ({"b": np.ones(2)}, r"1 of 2 .*'net/~/conv//w', of \[3,4\] is unexpected"),
        ({**WEIGHTS, "c": np.ones(())}, r"1 of 3 .*'c', is missing, expected \[\]"),
        (
            {"b": np.ones(3), "net/~/conv": {"w": jax.ShapeDtypeStruct((4, 3), np.float32)}},
            r"2 of 2 .*'b', is \[2\], expected \[3\]",
        ),
    ],
    ids=["extra", "missing", "shape"],
)
def test_weights_of_another_tree(tmp_path, like, says):
    path = tmp_path / "w.safetensors"
    save_weights(path, WEIGHTS, {})
    with pytest.raises(UserError, match=says) as error:
        load_weights(path, like)
    assert_one_sentence(error)


# Checkpoints.


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("run")
    save_steps(workdir, 1, 2)
    return workdir


@pytest.fixture
def workdir(two_steps, tmp_path) -> pathlib.Path:
    return shutil.copytree(two_steps, tmp_path / "run")


def test_state_round_trip(workdir):
    like = jax.eval_shape(lambda: make_state(0))
    with opened(workdir) as checkpoints:
        assert checkpoints.latest_step() == 2
        state, extra, step = checkpoints.restore(like, EXPECT)
    assert isinstance(state, TrainState)
    assert_same(state, make_state(2))
    assert (extra, step) == ({"expect": EXPECT, "seen": 20}, 2)


@pytest.fixture
def torn_reads():
    """Collects, while pytest captures them, the complaints of reads orbax left behind."""
    yield
    gc.collect()


def test_an_empty_workdir_has_no_checkpoint(tmp_path):
    with opened(tmp_path / "new") as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore(make_state(0), EXPECT) is None


@pytest.mark.parametrize("name", ["{a} b%c#d'e\"f", "-ü ", "a\nb", "~a", "a:b"])
def test_any_folder_s_name_comes_back(tmp_path, name):
    workdir = tmp_path / name / "run"
    save_steps(workdir, 1)
    workdir = workdir.rename(tmp_path / "renamed")
    with opened(workdir) as checkpoints:
        assert_same(checkpoints.restore(make_state(0), EXPECT)[0], make_state(1))
    workdir = workdir.rename(tmp_path / name / "run")
    save_steps(workdir, 2)
    with opened(workdir) as checkpoints:
        assert_same(checkpoints.restore(make_state(0), EXPECT)[0], make_state(2))


@pytest.mark.parametrize("name", ["run[a]", "a*b", "a?b", r"a\b"])
def test_a_name_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="takes for a pattern: rename it"):
        Checkpoints(tmp_path / name, 1)
    assert not os.listdir(tmp_path)


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_weights("~/a/w", WEIGHTS, {"classes": 3})
    assert load_weights("~/a/w")[1] == {"classes": 3}
    save_steps("~/run", 1)
    assert sorted(os.listdir(tmp_path)) == ["a", "run"]


def test_a_full_disk_keeps_the_checkpoint_before(small_disk):
    save_steps(small_disk, 1)
    large = make_state(2)._replace(params={"w": np.random.default_rng(0).normal(size=10**5)})
    checkpoints = Checkpoints(small_disk, 3)
    with pytest.raises(UserError, match=r"could not be written to .*No space left on device.*[.]$"):
        checkpoints.save(2, large, {"expect": EXPECT}, wait=True)
    with opened(small_disk) as checkpoints:
        state, _, step = checkpoints.restore(make_state(0), EXPECT)
    assert step == 1
    assert_same(state, make_state(1))
    with pytest.raises(UserError, match=r"cannot be written .*No space left on device"):
        save_weights(small_disk / "w", {"w": np.ones(10**5)}, {})
    assert sorted(os.listdir(small_disk)) == ["checkpoints"]


def test_the_last_k_are_kept(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "4"]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="another --workdir"):
        Checkpoints(tmp_path, 1)


def test_saving_a_step_again_changes_nothing(workdir):
    with opened(workdir) as checkpoints:
        checkpoints.save(2, make_state(9), {"expect": EXPECT}, wait=True)
        assert_same(checkpoints.restore(make_state(0), EXPECT)[0], make_state(2))


def test_arrays_may_change_while_a_save_is_under_way(tmp_path):
    state = {"w": np.ones(300_000, np.float32)}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        state["w"][:] = 2
        assert checkpoints.restore(state, {})[0]["w"].max() == 1


def test_training_that_diverges_keeps_the_save_under_way(tmp_path):
    checkpoints = Checkpoints(tmp_path, 3)
    with pytest.raises(NotFiniteError), checkpoints.closing():
        checkpoints.save(1, {"w": np.ones(3_000_000, np.float32)}, {})
        raise NotFiniteError("at step 2")
    assert (tmp_path / "checkpoints" / "1").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("torn_reads")
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do_and_nothing_is_deleted(workdir):
    newest = workdir / "checkpoints" / "2"
    tear(newest)
    before = files_of(workdir)
    with (
        opened(workdir) as checkpoints,
        pytest.raises(UserError, match=r"checkpoints/2 cannot be read .*: move this f") as error,
    ):
        checkpoints.restore(make_state(0), EXPECT)
    assert_one_sentence(error)
    assert files_of(workdir) == before
    newest.rename(workdir / "damaged")
    with opened(workdir) as checkpoints:
        state, _, step = checkpoints.restore(make_state(0), EXPECT)
        assert step == 1
        assert_same(state, make_state(1))
        checkpoints.save(2, make_state(2), {"expect": EXPECT}, wait=True)
        assert_same(checkpoints.restore(make_state(0), EXPECT)[0], make_state(2))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("torn_reads")
def test_each_damaged_file_gives_right_values_or_an_error(two_steps, tmp_path):
    failed = set()
    for source in files_of(two_steps / "checkpoints" / "2"):
        content = source.read_bytes()
        half = len(content) // 2
        damaged = [None, b"", content[:half]]
        damaged += [flip(content, at) for at in (0, half, len(content) - 2)]
        for number, bad in enumerate(damaged):
            run = tmp_path / str(number) / source.name
            shutil.copytree(two_steps, run)
            target = run / source.relative_to(two_steps)
            target.unlink() if bad is None else target.write_bytes(bad)
            with opened(run) as checkpoints:
                try:
                    state, extra, step = checkpoints.restore(make_state(0), EXPECT)
                    assert_same(state, make_state(step))
                    assert extra == {"expect": EXPECT, "seen": step * 10}
                except UserError:
                    failed.add(source.relative_to(two_steps / "checkpoints" / "2").parts[0])
            shutil.rmtree(run)
    assert {"state", "meta"} <= failed


@pytest.mark.parametrize(
    "expect, says",
    [
        ({**EXPECT, "batch_size": 128}, "batch_size = 64, but this run has batch_size = 128"),
        ({**EXPECT, "seed": 1}, "seed = null, but this run has seed = 1"),
        ({"classifier": "resnet9"}, 'theta_digest = "abc", but this run has theta_digest = null'),
    ],
    ids=["changed", "new", "gone"],
)
def test_another_configuration_is_refused(workdir, expect, says):
    with opened(workdir) as checkpoints, pytest.raises(UserError, match=says) as error:
        checkpoints.restore(make_state(0), expect)
    assert_one_sentence(error)
    assert "another --workdir" in str(error.value)


@pytest.mark.parametrize(
    "like, says",
    [
        (make_state(0, width=6), r"is float32\[3,3,2,5\], expected float32\[3,3,2,6\]"),
        (make_state(0)._replace(step=np.zeros((), np.int64)), r"int32\[\], expected int64\[\]"),
        (make_state(0)._replace(net_state={}), "'net_state//empty', of .* is unexpected"),
        (make_state(0)._replace(opt_state=()), "'opt_state//0//count', of .* is unexpected"),
    ],
    ids=["shape", "dtype", "state", "optimiser"],
)
def test_another_architecture_is_refused_and_nothing_moves(workdir, like, says):
    with opened(workdir) as checkpoints, pytest.raises(UserError, match=says) as error:
        checkpoints.restore(like, EXPECT)
    assert_one_sentence(error)
    assert sorted(os.listdir(workdir / "checkpoints")) == ["1", "2"]


def test_expected_tuples_equal_the_lists_json_made_of_them(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": np.ones(1)}, {"expect": {"widths": (16, 32)}})
        assert checkpoints.restore({"a": np.ones(1)}, {"widths": (16, 32)})[2] == 1


KILLED = """
    import os, signal, sys
    import numpy as np
    from ada_jax.run.checkpoint import Checkpoints

    checkpoints = Checkpoints(sys.argv[1], keep=1)
    checkpoints.save(1, {"w": np.full(4_000_000, 1, np.float32)}, {}, wait=True)
    noise = np.random.default_rng(2).normal(size=4_000_000).astype(np.float32)
    checkpoints.save(2, {"w": noise}, {})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    like = {"w": np.zeros(4_000_000, np.float32)}
    with opened(tmp_path, keep=1) as checkpoints:
        state, _, step = checkpoints.restore(like, {})
        # The write of 16 MB has begun and not ended, or the machine was faster than the kill.
        assert step in (1, 2)
        if step == 1:
            assert (state["w"] == 1).all()
            checkpoints.save(2, like, {}, wait=True)
        else:
            noise = np.random.default_rng(2).normal(size=4_000_000).astype(np.float32)
            np.testing.assert_array_equal(state["w"], noise)
        assert checkpoints.latest_step() == 2
    assert os.listdir(tmp_path / "checkpoints") == ["2"]


# ------------------------------------------------------------------------ in a bucket


@pytest.mark.slow
def test_weights_in_a_bucket(cloud):
    path = f"{cloud.folder()}/w.safetensors"
    with pytest.raises(UserError, match=f"no weights file {path}"):
        load_weights(path)
    save_weights(path, WEIGHTS, {"classifier": "resnet9"})
    assert_same(load_weights(path)[0], WEIGHTS)
    cloud.cut(path)
    with pytest.raises(UserError, match=f"{path} is not a complete safetensors file"):
        load_weights(path)


@pytest.mark.slow
def test_an_unfinished_step_in_a_bucket_gives_the_one_before(cloud):
    workdir = cloud.folder()
    save_steps(workdir, 1, 2, 3, keep=3)
    cloud.remove(f"{workdir}/checkpoints/3/commit_success.txt")  # As a kill leaves it.
    with opened(workdir) as checkpoints:
        state, _, step = checkpoints.restore(make_state(0), EXPECT)
        assert step == 2
        assert_same(state, make_state(2))
    save_steps(workdir, 3, keep=1)
    with opened(workdir) as checkpoints:
        assert_same(checkpoints.restore(make_state(0), EXPECT)[0], make_state(3))
    assert not cloud.has(f"{workdir}/checkpoints/1/commit_success.txt")


def test_importing_does_not_import_orbax():
    code = "import ada_jax.run.checkpoint, sys; sys.exit('orbax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_metadata_on_disk_is_plain_json(workdir, tmp_path):
    meta = json.loads((workdir / "checkpoints" / "2" / "meta" / "metadata").read_text())
    assert meta["extra"]["expect"] == EXPECT
    assert meta["tree"]["params//net/~/conv_0//w"] == "float32[3,3,2,5]"
    save_weights(tmp_path / "w.safetensors", WEIGHTS, {"classes": 10})
    with safetensors.safe_open(tmp_path / "w.safetensors", framework="np") as file:
        fields = {name: json.loads(text) for name, text in file.metadata().items()}
    assert (fields["format"], fields["classes"]) == (1, 10)
    assert fields["digest"] == digest(WEIGHTS)
