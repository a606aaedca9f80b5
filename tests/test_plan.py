"""The plan for TPUs: its checks, its two counts of arithmetic, and the real compiler's verdict."""

import json
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax import lax
from ml_collections import ConfigDict

from ada_jax import plan, sharding
from ada_jax.errors import UserError
from ada_jax.nets import tpu_conv
from ada_jax.run import costs
from experiments import cifar10, imagenet, quickstart

ROOT = pathlib.Path(__file__).parents[1]
small = st.integers(1, 4)


def tiny(**changes) -> ConfigDict:
    """The quickstart's networks, four images a core of 'v5e:2x2', two steps of AdA."""
    config = quickstart.get_config().unlock()
    config.batch_size, config.eval_batch_size, config.ada.steps = 16, 16, 2
    config.update_from_flattened_dict(changes)
    return config


# ------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "v5e:2", "v3-8", "2x2"])
def test_an_unknown_topology_is_answered_with_the_known_ones(topology):
    with pytest.raises(UserError, match=r"unknown: use v3:2x2, v4:2x2x1, v5e:2x2"):
        plan.main(tiny(), [topology])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 100}, r"config.batch_size=100 .* the 8 devices: .* multiple of 8"),
        ({"ada.microbatch": 3}, r"microbatch=3 does not divide the 4 examples of a device"),
        ({"ada.steps": -1}, r"config.ada.steps=-1 must be an integer"),
    ],
)
def test_a_config_that_does_not_work_is_refused_before_anything_is_compiled(changes, message):
    with pytest.raises(UserError, match=message):
        plan.main(tiny(**changes), ["v5e:2x2,v3:2x2"])


def test_a_missing_compiler_is_answered_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tpu\]'"):
        plan.main(tiny(), ["v5e:2x2"])


def test_a_topology_must_be_named():
    with pytest.raises(UserError, match="--topology is not set"):
        plan.main(tiny(), [])


def test_a_step_that_does_not_fit_is_told_with_both_sizes_and_exit_status_1(monkeypatch, capsys):
    words = "the total memory required for HLO temporaries (20.00G) exceeds available HBM (15.48G)"

    def refuse(step, devices):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Ran out of memory, {words}.\nMore")

    monkeypatch.setattr(plan, "devices_of", lambda topology: jax.devices("cpu") * 8)
    monkeypatch.setattr(plan, "useful_flops", lambda step, cores: 1e12)
    monkeypatch.setattr(plan, "compile_step", refuse)
    assert plan.main(tiny(), ["v3:2x2"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "does not fit on v3:2x2 with 2 examples a core" in error and words in error
    assert "set config.ada.microbatch" in error


FIGURES = {
    "cores": 8, "device": "TPU v3", "batch_per_core": 2, "useful_flops": 2e12, "fits": True,
    "compiled_flops": 2e12, "hbm_traffic": 1e9, "xla_flops": 1e12, "xla_bytes": 1e9,
    "data": "50,000 examples of 32x32, 10 classes", "hbm_traffic_kernels": 4e8,
    "hbm_traffic_products": 3e8, "hbm_traffic_copies": 2e8, "hbm_traffic_others": 1e8,
    "hbm_arguments": 2**29, "hbm_temporary": 2**30, "hbm_code": 2**29, "hbm_total": 2**31,
    "hbm_available": 2**33, "hbm_share": 0.25, "flops_seconds": 0.03, "traffic_seconds": 0.36,
    "floor_seconds": 0.36, "compile_seconds": 1.0,
}  # fmt: skip


def test_a_file_collects_plans_and_none_is_made_twice(monkeypatch, capsys, tmp_path):
    measured = []

    def measure(config, topology, examples):
        measured.append((config.name, topology))
        return plan._identity(config, topology, examples) | FIGURES

    monkeypatch.setattr(plan, "plan_step", measure)
    monkeypatch.setattr(plan.importlib.metadata, "version", lambda name: "1")
    path = str(tmp_path / "new" / "plans.json")
    one, other = tiny(), tiny(batch_size=32)
    assert plan.main(one, ["v3:2x2"], path) is None
    assert "Plans" not in capsys.readouterr().out
    plan.main(one, ["v3:2x2,v5e:2x4"], path)
    plan.main(other, ["v5e:2x4"], path)
    assert measured == [(one.name, "v3:2x2"), (one.name, "v5e:2x4"), (other.name, "v5e:2x4")]
    assert len(json.loads(pathlib.Path(path).read_text())) == 3
    *_, last = capsys.readouterr().out.strip().splitlines()
    hours = plan.steps_of(other) * 0.36 / 3600
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    expected = [other.name, "v5e:2x4", "2.00", "2.00", "75%", "0.360"]
    assert cells == [*expected, f"{hours:.1f}", f"{hours / 0.4:.1f}"]
    monkeypatch.setattr(plan.importlib.metadata, "version", lambda name: "2")
    plan.main(one, ["v3:2x2"], path)
    assert len(measured) == 4 and len(json.loads(pathlib.Path(path).read_text())) == 4


@pytest.mark.parametrize("content", ["[", "{}x", '[{"step": 1}]', '{"clean": 1}', "[1]"])
def test_a_file_of_another_kind_is_not_overwritten(content, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(UserError, match="is not a file of plans"):
        plan.main(tiny(), ["v3:2x2"], str(path))
    assert path.read_text() == content


# ------------------------------------------------------------------------------- the arithmetic


@given(st.integers(1, 9), small, small, st.integers(0, 3), small, small)
def test_taps_are_what_a_convolution_of_ones_adds_up(size, kernel, stride, pad, dilation, holes):
    line, window = np.zeros((size - 1) * dilation + 1), np.zeros((kernel - 1) * holes + 1)
    line[::dilation], window[::holes] = 1, 1
    line = np.pad(line, pad)
    assume(len(line) >= len(window))
    out = np.convolve(line, window, "valid")[::stride]
    counted = costs.taps(
        size,
        kernel,
        len(out),
        stride=stride,
        before=pad,
        dilation=dilation,
        kernel_dilation=holes,
    )
    assert counted == out.sum()


def test_loops_count_as_often_as_they_turn_and_what_nobody_needs_not_at_all():
    product = 2 * 8**3

    def f(a, b):
        loop = lax.fori_loop(0, 5, lambda i, c: c @ a, b)
        unused = lax.fori_loop(0, 7, lambda i, c: c @ b, a)
        branch = lax.platform_dependent(a, cpu=lambda a: a @ a @ a, default=lambda a: a @ a)
        return jax.jit(lambda a, b, c: (a @ b, b @ c))(loop, branch, unused)[0]

    jaxpr = jax.make_jaxpr(f)(jnp.ones((8, 8)), jnp.ones((8, 8)))
    assert costs.useful_flops(jaxpr, "tpu") == (5 + 1 + 1) * product
    assert costs.useful_flops(jaxpr, "cpu") == (5 + 2 + 1) * product


def test_a_scan_counts_what_its_wanted_carry_and_outputs_need():
    product = 2 * 8**3

    def f(a, b, xs):
        def body(carry, x):
            used, unused = carry
            return (used @ a, unused @ b), (x @ a, x @ b)

        (used, _), (_, stacked) = lax.scan(body, (b, b), xs)
        return used, stacked

    jaxpr = jax.make_jaxpr(f)(jnp.ones((8, 8)), jnp.ones((8, 8)), jnp.ones((5, 8, 8)))
    assert costs.useful_flops(jaxpr) == 5 * 2 * product


def conv(size: int, inputs: int, outputs: int, stride: int = 1) -> int:
    """Flops of a 3x3 convolution with padding 1, from a 'size' wide image."""
    out = size // stride
    valid = 3 * out - (2 if stride == 1 else 1)
    return 2 * valid**2 * inputs * outputs


def patches(size: int, inputs: int, outputs: int) -> int:
    """Flops of one product with a patch matrix, whose rows have the padding in them."""
    return 2 * 9 * size**2 * inputs * outputs


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_the_tpu_s_kernels_cost_what_pencil_and_paper_say(kind, monkeypatch):
    monkeypatch.setattr(tpu_conv, "_TILE", 16 * 512)
    monkeypatch.setattr(tpu_conv, "_CHUNK", 16 * 256)
    examples, size, width = 5, 32, jnp.dtype(kind).itemsize
    x = jax.ShapeDtypeStruct((examples, 1, size, size, 16), kind)
    w = jax.ShapeDtypeStruct((examples, 3, 3, 16, 16), kind)
    b = jax.ShapeDtypeStruct((examples, 16), kind)

    def estimate(f, *args):
        jaxpr = jax.make_jaxpr(jax.vmap(lambda *args: f(*args, 1)))(*args)
        assert costs.useful_flops(jaxpr) == expected_flops
        (cost,) = (e.params["cost_estimate"] for e in jaxpr.eqns if "cost_estimate" in e.params)
        return cost

    # Two tiles of 512 pixels with 128 pixels of the neighbours on both sides.
    image, kernel, bias = 16 * size**2, 9 * 16**2, 16 * 32 // width
    halo = 16 * 2 * 2 * 128
    expected_flops = examples * patches(size, 16, 16)
    cost = estimate(tpu_conv.forward, x, w, b)
    assert cost.flops == expected_flops
    assert cost.bytes_accessed == examples * width * (2 * image + halo + kernel + bias)
    expected_flops *= 2
    cost = estimate(tpu_conv.gradients, x, w, x)
    assert cost.bytes_accessed == examples * width * (3 * image + halo + 2 * kernel + bias)


def test_the_tiny_step_needs_what_pencil_and_paper_say():
    edsr = patches(32, 3, 16) + 9 * patches(32, 16, 16) + patches(32, 16, 3)
    stem = conv(32, 3, 16)
    stages = [(32, 16, 32), (16, 32, 64), (8, 64, 128)]
    resnet = stem + 2 * 128 * 10
    for size, inputs, width in stages:
        resnet += conv(size, inputs, width, 2) + 2 * conv(size // 2, width, width)

    ascent = 3 * edsr + 2 * resnet
    rendered = edsr + resnet
    classifier = 3 * resnet - stem
    step = plan.step_of(tiny(**{"ada.steps": 3}), batch_size=2)
    expected = 2 * (3 * ascent + rendered + classifier)
    # SSIM's windows are not in the sum: 0.3% of it.
    np.testing.assert_allclose(plan.useful_flops(step, cores=4), expected, rtol=0.01)


@pytest.mark.slow
def test_imagenet_s_step_has_its_shapes_and_length_without_data_or_weights():
    config = imagenet.get_config()
    step = plan.step_of(config, config.batch_size // 32)
    state, thetas, batch, _ = step.arguments
    assert batch["image"].shape == (32, 128, 128, 3)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == 25_557_032
    assert sum(leaf.size for leaf in jax.tree.leaves(thetas)) == 1_517_571
    assert plan.steps_of(config) == round(90 * 1_281_167 / 1024)
    mapped = jax.make_jaxpr(step.update, axis_env=[(sharding.AXIS, 32)], return_shape=True)
    (_, (after, metrics)) = mapped(*step.arguments)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert metrics["ada_ssim_after"].shape == ()


PROGRAM = """
HloModule step, is_scheduled=true

%fused (p0: f32[4,8,8,16], p1: f32[3,3,16,32]) -> f32[4,8,8,32] {
  %p0 = f32[4,8,8,16]{3,2,1,0:T(8,128)} parameter(0)
  %p1 = f32[3,3,16,32]{3,2,1,0:T(8,128)S(1)} parameter(1)
  ROOT %conv = f32[4,8,8,32]{3,2,1,0:T(8,128)S(1)} convolution(%p0, %p1), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
}

%write (p0: f32[4,8,8,16], p1: f32[4,8,8,16]) -> f32[4,8,8,16] {
  %zero = s32[]{:T(128)} constant(0)
  %whole = f32[4,8,8,16]{3,2,1,0:T(8,128)} parameter(1)
  %into = f32[4,8,8,16]{3,2,1,0:T(8,128)} parameter(0)
  %part = f32[1,8,8,16]{3,2,1,0:T(8,128)} dynamic-slice(%whole, %zero, %zero, %zero, %zero), dynamic_slice_sizes={1,8,8,16}
  ROOT %update = f32[4,8,8,16]{3,2,1,0:T(8,128)} dynamic-update-slice(%into, %part, %zero, %zero, %zero, %zero)
}

%body (state: (s32[], f32[4,8,8,16], f32[3,3,16,32])) -> (s32[], f32[4,8,8,16], f32[3,3,16,32]) {
  %state = (s32[]{:T(128)}, f32[4,8,8,16]{3,2,1,0:T(8,128)}, /*index=2*/f32[3,3,16,32]{3,2,1,0:T(8,128)}) parameter(0)
  %x = f32[4,8,8,16]{3,2,1,0:T(8,128)} get-tuple-element(%state), index=1
  %w = f32[3,3,16,32]{3,2,1,0:T(8,128)} get-tuple-element(%state), index=2
  %start = (f32[3,3,16,32]{3,2,1,0:T(8,128)S(1)}, f32[3,3,16,32]{3,2,1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w)
  %fetched = f32[3,3,16,32]{3,2,1,0:T(8,128)S(1)} copy-done(%start)
  %y = f32[4,8,8,32]{3,2,1,0:T(8,128)S(1)} fusion(%x, %fetched), kind=kOutput, calls=%fused
  %some = ((f32[4,8,8,16]{3,2,1,0:T(8,128)}), f32[1,8,8,16]{3,2,1,0:T(8,128)S(1)}, s32[]{:T(128)S(2)}) slice-start(%x), slice={[0:1], [0:8], [0:8], [0:16]}
  %written = f32[4,8,8,16]{3,2,1,0:T(8,128)} fusion(%x, %x), kind=kLoop, calls=%write
  ROOT %out = (s32[]{:T(128)}, f32[4,8,8,16]{3,2,1,0:T(8,128)}, f32[3,3,16,32]{3,2,1,0:T(8,128)}) tuple(%i, %x, %w)
}

%zeros () -> f32[4,8] {
  ROOT %nothing = f32[4,8]{1,0:T(8,128)S(1)} constant({...})
}

%zeros_and_kernel (p0: f32[4,8]) -> f32[4,8] {
  %p0 = f32[4,8]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %inner = f32[4,8]{1,0:T(8,128)} custom-call(%p0), custom_call_target="tpu_custom_call", backend_config={"custom_call_config": {"body": "TUzv", "cost_estimate": {
"bytes_accessed":2000,
"flops":50,
"transcendentals":0
}, "serialization_format": 1}}
}

%condition (state: (s32[], f32[4,8,8,16], f32[3,3,16,32])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[4,8,8,16]{3,2,1,0:T(8,128)}, f32[3,3,16,32]{3,2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} constant(10)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[32,16]{1,0:T(8,128)(2,1)} parameter(1)
  %loop = (s32[]{:T(128)}, f32[4,8,8,16]{3,2,1,0:T(8,128)}, f32[3,3,16,32]{3,2,1,0:T(8,128)}) while(%init), condition=%condition, body=%body
  %kept = f32[4,8]{1,0:T(8,128)S(1)} fusion(), kind=kLoop, calls=%zeros
  %kernel = (f32[4,8]{1,0:T(8,128)}, f32[2,8]{1,0:T(8,128)}) custom-call(%kept, %kept), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"700","transcendentals":"0","bytes_accessed":"1000","remote_bytes_transferred":"0"}}}
  %fused_kernel = f32[4,8]{1,0:T(8,128)} fusion(%kept), kind=kCustom, calls=%zeros_and_kernel
  ROOT %dot = bf16[64,16]{1,0:T(8,128)(2,1)} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""  # noqa: E501


@pytest.mark.parametrize("boolean", [False, True])
def test_a_conditional_costs_its_most_expensive_branch(boolean):
    small, large = (lambda x, n=n: jnp.tile(x, (1, n)) @ jnp.ones((16 * n, 16)) for n in (1, 4))

    def alone(x):
        return large(x)

    def chosen(i, x):
        return jax.lax.cond(i, large, small, x) if boolean else jax.lax.switch(i, [small, large], x)

    x, index = jnp.ones((16, 16)), jnp.array(True) if boolean else jnp.int32(1)
    program = jax.jit(chosen).lower(index, x).compile().as_text()
    assert " conditional(" in program
    expected = costs.program_costs(jax.jit(alone).lower(x).compile().as_text())
    assert costs.program_costs(program).flops == expected.flops == 2 * 16 * 64 * 16


def test_a_compiled_program_costs_what_its_loops_and_memory_spaces_say():
    cost = costs.program_costs(PROGRAM)
    x, w = 4 * 4 * 8 * 8 * 16, 4 * 3 * 3 * 16 * 32
    assert cost.flops == 10 * 4 * conv(8, 16, 32) + 2 * 64 * 32 * 16 + 700 + 50
    # The fused convolution reads x, the copy w, the slice a quarter of x, the update reads and
    # writes one. One array that the kernel reads is on the chip, also inside of the fusion.
    assert cost.traffic == {
        "products": 10 * x + 2 * (64 * 32 + 32 * 16 + 64 * 16),
        "copies": 10 * (w + 3 * x / 4),
        "kernels": 1000 - 4 * 4 * 8 + 4 * 4 * 8,
    }
    assert cost.hbm_bytes == sum(cost.traffic.values())


# ------------------------------------------------------------------------------- the compiler


def compile_for(tmp_path, config: str, *flags: str) -> list[dict]:
    """Runs the binary and returns its figures."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    path = tmp_path / "plan.json"
    command = [sys.executable, "-m", "ada_jax.plan", f"--config={config}", f"--json={path}"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(path.read_text())


@pytest.mark.slow
def test_the_tiny_step_compiles_for_a_tpu_and_makes_no_more_of_the_work(tmp_path):
    # The compiler splits the images of smaller batches, with up to a fifth more flops in all.
    changed = [f"--config.{name}=256" for name in ("batch_size", "eval_batch_size")]
    changed.append("--config.ada.steps=2")
    (f,) = compile_for(tmp_path, "experiments/quickstart.py", "--topology=v5e:2x2", *changed)
    assert f["cores"] == 4 and f["batch_per_core"] == 64
    np.testing.assert_allclose(f["compiled_flops"], f["useful_flops"], rtol=0.02)
    assert f["hbm_share"] < 0.05


@pytest.mark.skipif(
    "ADA_JAX_PLAN" not in os.environ, reason="ADA_JAX_PLAN=1 compiles for four minutes"
)
@pytest.mark.slow
def test_the_paper_s_step_fits_on_a_v3_8(tmp_path):
    (f,) = compile_for(tmp_path, "experiments/cifar10.py", "--topology=v3:2x2")
    assert f["batch_per_core"] * f["cores"] == cifar10.get_config().batch_size
    assert f["hbm_share"] < 0.9
    assert f["compiled_flops"] < 1.3 * f["useful_flops"]


def test_a_run_s_hours_follow_from_the_floor():
    config = cifar10.get_config()
    steps = plan.steps_of(config, 50_000)
    assert steps == round(300 * 50_000 / 256)
    hours, shown = plan.run_row({"floor_seconds": 0.36, "steps": 10_000})
    assert hours == "10,000 steps, hours" and shown == "1.0, 2.5, 5.0 at 100%, 40%, 20% of that"


def test_a_run_without_examples_is_refused():
    with pytest.raises(UserError, match="--examples=0"):
        plan.main(cifar10.get_config(), ["v5e:2x2"], examples=0)
