"""The studies: what they measure, that they resume, and their tables, figures and refusals."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ada_jax import ssim, study
from ada_jax.errors import UserError
from ada_jax.nets import corruption_nets
from ada_jax.report import figures
from tests.conftest import assert_mistake, run_here


@pytest.fixture
def net(small_networks):
    return corruption_nets.make("edsr_small")


@pytest.fixture(scope="module")
def images():
    return study.load_images("photos", "test", "", 6, seed=0)[0]


def test_every_example_counts_once_and_keeps_its_key_whatever_the_batch():
    x = np.arange(7, dtype=np.float32)
    f = lambda key, x: x + jax.vmap(jax.random.uniform)(key)  # noqa: E731
    whole = study.in_batches(f, x, batch_size=7)
    np.testing.assert_array_equal(study.in_batches(f, x, batch_size=2), whole)
    np.testing.assert_array_equal(study.in_batches(f, x, batch_size=16), whole)
    assert len(set(np.round(whole - x, 5))) == 7


@pytest.mark.slow
def test_without_a_radius_the_network_itself_is_measured_and_larger_radii_reach_further(
    net, images
):
    results = study.study_ssim({"a": net}, study._to_float(images), {"radii": ["0.3", "0.6"]}, 3)[
        "a"
    ]
    rendered = net.apply(net.theta, jnp.float32(images) / 255)
    expected = ssim.ssim(jnp.float32(images) / 255, jnp.clip(rendered, 0, 1))
    np.testing.assert_allclose(results["0"]["values"], expected, atol=2e-5)
    assert results["0"]["mean"] > results["0.3"]["mean"] > results["0.6"]["mean"]
    assert results["0.3"]["std"] < results["0.6"]["std"]
    assert study.ssim_table({"a": results}).count("\n") == 2


@pytest.mark.slow
def test_an_attack_reaches_further_than_chance(net, images):
    x = jnp.float32(images) / 255
    keys, y = jax.random.split(jax.random.key(0), len(x)), jnp.zeros(len(x), int)
    logits_fn = lambda x: 50 * jnp.stack([x[..., 0].mean((1, 2)), x[..., 1].mean((1, 2))], -1)  # noqa: E731
    attacked = study.attacked_ssim(net, logits_fn, keys, x, y, nu=0.1, steps=5)
    assert attacked.mean() < study.random_ssim(net, keys, x, 0.1).mean() - 0.01


@pytest.mark.slow
def test_reconstruction_comes_nearer_to_the_corruption_with_every_step(net, images):
    x = jnp.float32(images) / 255
    target = jnp.clip(x + 0.2, 0, 1)
    keys = jax.random.split(jax.random.key(0), len(x))

    reached = jax.jit(lambda steps: study.reconstruct(net, keys, x, target, steps=steps).mean())
    none, few, many = map(reached, (0, 5, 20))
    np.testing.assert_allclose(none, ssim.ssim(target, net.apply(net.theta, x)).mean(), atol=1e-3)
    assert none < few < many


@pytest.mark.slow
def test_reconstruction_of_an_example_does_not_depend_on_its_neighbours(net, images):
    x, keys = jnp.float32(images) / 255, jax.random.split(jax.random.key(0), len(images))
    f = jax.jit(lambda key, x: study.reconstruct(net, key, x, 1 - x, steps=3))
    others = x.at[2:].set(1 - x[2:])
    np.testing.assert_allclose(f(keys, others)[:2], f(keys, x)[:2], atol=1e-4)


def test_severities_are_mixed_and_each_image_has_its_own():
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    out = study.corrupted("brightness", images, seed=0)
    assert len(np.unique(np.round((out.astype(int) - images).mean((1, 2, 3))))) >= 5
    np.testing.assert_array_equal(out, study.corrupted("brightness", images, seed=0))
    assert (out != study.corrupted("brightness", images, seed=1)).any()


@pytest.mark.slow
def test_reconstruction_resumes_after_each_corruption(net, images):
    settings = {
        "corruptions": ["brightness", "contrast"],
        "steps": 1,
        "learning_rate": 1e-3,
        "seed": 0,
    }
    saved = []
    save = lambda results: saved.append(json.loads(json.dumps(results)))  # noqa: E731
    whole = study.study_reconstruct({"edsr_small": net}, images, settings, 2, {}, save)
    assert [list(r["edsr_small"]) for r in saved] == [["brightness"], ["brightness", "contrast"]]
    resumed = study.study_reconstruct({"edsr_small": net}, images, settings, 2, saved[0], save)
    assert len(saved) == 3
    chex.assert_trees_all_close(resumed, whole, rtol=1e-5)
    table = study.reconstruct_table(whole)
    assert "| brightness |" in table and "| paper | | 0.91 ± 0.26 |" in table


def test_results_of_other_settings_are_not_taken_up(tmp_path):
    path = tmp_path / "x.json"
    assert study.read_results(str(path), {}) == {}
    path.write_text(json.dumps({"settings": {"seed": 1}, "results": {"a": {}}}))
    assert study.read_results(str(path), {"seed": 1}) == {"a": {}}
    with pytest.raises(UserError, match="other settings"):
        study.read_results(str(path), {"seed": 2})
    with pytest.raises(UserError, match="other settings"):
        study.read_results(str(path), {"seed": 1, "images": "a"})


def test_figures_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    entry = lambda n: {"values": list(1 - 0.1 * rng.random(50)), "mean": n, "std": 0.1}  # noqa: E731
    figures.ssim_densities(str(tmp_path / "a.png"), {"n": {"0": entry(1), "0.1": entry(0.9)}})
    figures.reconstruction_bars(str(tmp_path / "b.png"), {"n": {"fog": entry(1)}, "m": {}})
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in "ab")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fid"], "Name one study"),
        (["ssim", "--nets=vdsr"], "'vdsr' is unknown"),
        (["reconstruct", "--corruptions=rain"], "--corruptions=rain is unknown"),
        (["ssim", "--cpu_devices=0"], "--cpu_devices=0"),
        (["ssim", "--radii=-0.1"], "--radii=-0.1 is not a radius"),
        (["ssim", "--radii=1e-2,1.,e5"], "--radii=e5 is not a radius"),
        (["ssim", "--radii=0,0.0"], "--radii=0,0.0 has no positive radius"),
        (["ssim", "--examples=1"], "--examples=1 is too few"),
        (["reconstruct", "--corruptions="], "--corruptions is empty"),
        (
            ["ssim", "--dataset=npz", "--data_dir=33x47.npz", "--split=all"],
            "--nets=('edsr_baseline_x4', 'cae') does not fit images of 33x47",
        ),
        (
            ["ssim", "--dataset=photos", "--nets=edsr_small", "--examples=100000"],
            "--examples=100000",
        ),
    ],
)
def test_mistakes_are_told_in_a_sentence(words, said, tmp_path):
    grey = np.full((640, 33, 47, 3), 9, np.uint8)
    np.savez_compressed(tmp_path / "33x47.npz", images=grey, labels=np.arange(640) % 2)
    words = [word.replace("33x47", f"{tmp_path}/33x47") for word in words]
    assert_mistake(run_here("study", *words, f"--out={tmp_path}/out"), said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"settings": {}}', '{"settings": {}, "results": {"ssim": NaN}}']
)
def test_a_damaged_file_of_results_is_kept_and_named(tmp_path, text):
    path = tmp_path / "ssim.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"ssim\.json cannot be read"):
        study.read_results(str(path), {})
    assert path.read_text() == text


@pytest.mark.slow
def test_the_command_writes_its_measurements_and_rejects_other_settings(net, tmp_path):
    flags = ["--dataset=photos", "--examples=2", "--nets=edsr_small", "--cpu_devices=1"]
    flags += [f"--out={tmp_path}"]
    ssims = [*flags, "--radii=0.02"]
    for what, own in (
        ("ssim", ssims),
        ("reconstruct", [*flags, "--corruptions=contrast,fog", "--steps=1"]),
    ):
        done = run_here("study", what, *own)
        assert done.returncode == 0, done.stderr
        (written,) = tmp_path.glob(f"*{what}*.json")
        assert (
            str(written) in done.stdout
            and "edsr_small" in json.loads(written.read_text())["results"]
        )
        assert list(tmp_path.glob(f"*{what}*.png"))
    assert_mistake(run_here("study", "ssim", *ssims, "--seed=1"), "is of other settings")
