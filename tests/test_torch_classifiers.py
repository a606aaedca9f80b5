"""Classifiers from and to PyTorch: the same logits, bit for bit the same numbers, nothing run."""

import functools
import json
import os
import pathlib
import pickle
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest

import ada_jax
from ada_jax import export_weights, import_weights
from ada_jax.data import sources
from ada_jax.errors import UserError
from ada_jax.evaluation import scoring
from ada_jax.nets import classifiers, torch_layouts, weight_files
from tests.conftest import assert_mistake, run_here

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[torch]'")
F = torch.nn.functional

MEAN, STD = (0.49, 0.48, 0.44), (0.2, 0.24, 0.26)
FLAGS = ("--mean=0.49,0.48,0.44", "--std=0.2,0.24,0.26")
SLOW = ("preact_resnet18_no_bn", "preact_resnet50", "preact_resnet20", "resnet56")
SLOW += ("wide_resnet28_4", "wide_resnet28_10")
QUICK = ("resnet20", "preact_resnet18", "preact_resnet18_v2", "wide_resnet40_2", "resnet9")
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]

# Some arrays of each layout, from the published code, and the number of all with 10 classes.
PUBLISHED = {
    "preact_resnet18": {
        "conv1.weight": (64, 3, 3, 3),
        "layer1.0.bn1.running_mean": (64,),
        "layer2.0.shortcut.0.weight": (128, 64, 1, 1),
        "layer4.1.conv2.weight": (512, 512, 3, 3),
        "bn.num_batches_tracked": (),
        "linear.bias": (10,),
        "all": 107,
    },
    "resnet20": {
        "bn1.weight": (16,),
        "layer2.0.conv1.weight": (32, 16, 3, 3),
        "layer3.2.bn2.running_var": (64,),
        "linear.weight": (10, 64),
        "all": 116,
    },
    "wide_resnet40_2": {
        "block1.layer.0.convShortcut.weight": (32, 16, 1, 1),
        "block3.layer.5.bn2.weight": (128,),
        "bn1.bias": (128,),
        "fc.weight": (10, 128),
        "all": 227,
    },
}


def network(name, classes=10):
    """A network in PyTorch, as if trained: nothing is at its start."""
    content = export_weights.model_file(name, classes, mean=MEAN, std=STD, file="x.pt")
    scope = {"__file__": "model.py"}
    exec(content, scope)
    torch.manual_seed(0)
    module = scope["Classifier"]().eval()
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (layer.weight, 0.4, 0.8),
                (layer.bias, -0.3, 0.3),
                (layer.running_mean, -0.3, 0.3),
                (layer.running_var, 0.3, 0.9),
            ):
                torch.nn.init.uniform_(tensor, low, high)
            layer.num_batches_tracked += 77
    return module


def images(size=32, count=2):
    return np.random.default_rng(0).random((count, size, size, 3), np.float32)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def our_logits(name, file, x, classes=10):
    tree, metadata = weight_files.load_weights(file)
    assert tuple(metadata["mean"]) == MEAN and metadata["classes"] == classes
    net = classifiers.make(name, classes, mean=metadata["mean"], std=metadata["std"])
    apply = jax.jit(functools.partial(net.apply, is_training=False))
    return np.asarray(apply(tree["params"], tree["state"], None, x)[0])


def assert_same(logits, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


# ------------------------------------------------------------------- an independent statement


def statement(name, state, x):
    """The published networks as functions of their state dicts."""
    conv = lambda x, n, stride=1: F.conv2d(  # noqa: E731
        x, state[f"{n}.weight"], None, stride, state[f"{n}.weight"].shape[-1] // 2
    )

    def norm(x, n):
        mean, var = (state[f"{n}.running_{which}"] for which in ("mean", "var"))
        return F.batch_norm(x, mean, var, state[f"{n}.weight"], state[f"{n}.bias"])

    norm_relu = lambda x, n: F.relu(norm(x, n))  # noqa: E731
    wide, preact = name.startswith("wide"), name.startswith(("preact", "wide"))
    h = (nchw(x) - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    h = conv(h, "conv1") if preact else norm_relu(conv(h, "conv1"), "bn1")
    for stage in (1, 2, 3, 4):
        if name == "resnet9" and stage < 4:
            h = norm_relu(conv(h, f"layer{stage}.down", 2), f"layer{stage}.down_bn")
            r = norm_relu(conv(h, f"layer{stage}.conv1"), f"layer{stage}.bn1")
            h = h + norm_relu(conv(r, f"layer{stage}.conv2"), f"layer{stage}.bn2")
        for i in range(12):
            n = f"block{stage}.layer.{i}" if wide else f"layer{stage}.{i}"
            if f"{n}.conv1.weight" not in state:
                break
            stride = 2 if stage > 1 and i == 0 else 1
            if not preact:
                r = norm(
                    conv(norm_relu(conv(h, f"{n}.conv1", stride), f"{n}.bn1"), f"{n}.conv2"),
                    f"{n}.bn2",
                )
                if stride == 2:
                    zeros = torch.zeros_like(h[:, : h.shape[1] // 2, ::2, ::2])
                    h = torch.cat([zeros, h[:, :, ::2, ::2], zeros], 1)
                h = F.relu(r + h)
                continue
            pre = norm_relu(h, f"{n}.bn1")
            deep = f"{n}.conv3.weight" in state
            r = norm_relu(conv(pre, f"{n}.conv1", 1 if deep else stride), f"{n}.bn2")
            r = conv(r, f"{n}.conv2", stride if deep else 1)
            r = conv(norm_relu(r, f"{n}.bn3"), f"{n}.conv3") if deep else r
            projection = f"{n}.convShortcut" if wide else f"{n}.shortcut.0"
            raw = not wide and not deep and not name.endswith("v2")
            if f"{projection}.weight" in state:
                h = conv(h if raw else pre, projection, stride)
            h = r + h
    if preact and not name.endswith("no_bn"):
        h = norm_relu(h, "bn1" if wide else "bn")
    last = "fc" if wide else "linear"
    size = h.shape[-1]
    h = F.avg_pool2d(h, size).flatten(1)
    return F.linear(h, state[f"{last}.weight"], state[f"{last}.bias"])


@pytest.mark.parametrize("name", NAMES)
def test_imported_networks_are_pytorchs_and_go_back_bitwise(tmp_path, name):
    state, x = network(name).network.state_dict(), images()
    torch.save(state, tmp_path / "in.pt")
    weights, out = str(tmp_path / "w.safetensors"), str(tmp_path / "out" / "back.pt")
    import_weights.import_classifier(name, str(tmp_path / "in.pt"), weights, MEAN, STD)
    with torch.no_grad():
        expected = statement(name, state, x)
    assert_same(our_logits(name, weights, x), expected)
    export_weights.export(weights, out)
    back = torch.load(out, weights_only=True)
    assert set(back) == set(state)
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key
    loaded = runpy.run_path(str(tmp_path / "out" / "model.py"))["load"]()
    with torch.no_grad():
        assert_same(loaded(nchw(x)), expected)
    again = str(tmp_path / "again.safetensors")
    import_weights.import_classifier(name, out, again, MEAN, STD)
    trees = [weight_files.load_weights(file)[0] for file in (weights, again)]
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [18, 50])
def test_torchvisions_networks_at_224_pixels(tmp_path, depth):
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    name = f"torchvision_resnet{depth}"
    state, x = network(name, classes=1000).network.state_dict(), images(224)
    torch.save({"model": state}, tmp_path / "in.pt")
    weights = str(tmp_path / "w.safetensors")
    import_weights.import_classifier(name, str(tmp_path / "in.pt"), weights, MEAN, STD)
    module = getattr(models, f"resnet{depth}")(weights=None).eval()
    module.load_state_dict(state)
    normalised = np.float32((x - np.float32(MEAN)) / np.float32(STD))
    with torch.no_grad():
        expected = module(nchw(normalised))
    assert_same(our_logits(name, weights, x, classes=1000), expected)
    export_weights.export(weights, str(tmp_path / "back.safetensors"))
    loaded = runpy.run_path(str(tmp_path / "model.py"))["load"]()
    assert all(torch.equal(t, state[k]) for k, t in loaded.network.state_dict().items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_are_the_published_ones(name):
    net = classifiers.make(name, 10)
    init = functools.partial(net.init, is_training=True)
    variables = jax.eval_shape(init, jax.random.key(0), images())
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), variables)
    shapes = {key: a.shape for key, a in torch_layouts.to_torch(name, *zeros).items()}
    expected = dict(PUBLISHED[name])
    # Five arrays of each batch normalisation, one of each convolution, two of the last layer.
    assert len(shapes) == expected.pop("all")
    assert shapes | expected == shapes


READ_AGAIN = """
import sys
import numpy as np, torch
import model
with torch.no_grad():
    np.save("logits.npy", model.load()(torch.from_numpy(np.load("images.npy"))).numpy())
assert not any(name.startswith(("jax", "ada_jax", "haiku")) for name in sys.modules)
assert model.CLASS_NAMES == ["cat", 'a "dog"', "it's"]
"""


def test_a_fresh_process_of_pytorch_loads_the_exported_folder(tmp_path):
    state, x = network("resnet20", classes=3).network.state_dict(), images()
    tree = torch_layouts.from_torch("resnet20", {k: t.numpy() for k, t in state.items()})
    metadata = {"classifier": "resnet20", "classes": 3, "mean": MEAN, "std": STD}
    metadata["class_names"] = ["cat", 'a "dog"', "it's"]
    (tmp_path / "run").mkdir()
    weights = tmp_path / "run" / "classifier.safetensors"
    weight_files.save_weights(weights, tree, metadata)
    folder = tmp_path / "out"
    done = run_here("export_weights", tmp_path / "run", folder / "resnet20.pt")
    assert done.returncode == 0 and "resnet20 with 3 classes, 116 tensors" in done.stdout
    np.save(folder / "images.npy", np.moveaxis(x, -1, 1))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", READ_AGAIN], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_same(np.load(folder / "logits.npy"), our_logits("resnet20", weights, x, classes=3))


def test_training_continues_from_imported_averages(tmp_path):
    state = {k: t.numpy() for k, t in network("resnet20").network.state_dict().items()}
    tree = torch_layouts.from_torch("resnet20", state)
    net = classifiers.make("resnet20", 10, bn_decay=0.75)
    train = jax.jit(functools.partial(net.apply, is_training=True))
    _, after = train(tree["params"], tree["state"], None, images(8, count=4))
    normalised = (images(8, count=4) - np.float32(CIFAR_MEAN)) / np.float32(CIFAR_STD)
    h = F.conv2d(nchw(normalised), torch.tensor(state["conv1.weight"]), padding=1)
    mean = 0.75 * state["bn1.running_mean"] + 0.25 * h.mean((0, 2, 3)).numpy()
    exported = torch_layouts.to_torch("resnet20", tree["params"], after)
    np.testing.assert_allclose(exported["bn1.running_mean"], mean, atol=1e-5)
    assert exported["bn1.num_batches_tracked"] == 78


@pytest.mark.parametrize(
    ("batches", "expected"), [(np.full(1, 5), 5), (np.int64(2**40), 2**31 - 1 - 2**20)]
)
def test_a_count_of_batches_has_any_shape_and_size(batches, expected):
    state = {k: t.numpy() for k, t in network("resnet20").network.state_dict().items()}
    tree = torch_layouts.from_torch("resnet20", state | {"bn1.num_batches_tracked": batches})
    exported = torch_layouts.to_torch("resnet20", tree["params"], tree["state"])
    assert exported["bn1.num_batches_tracked"] == expected


CIFAR_MEAN, CIFAR_STD = classifiers.CIFAR10_MEAN, classifiers.CIFAR10_STD


# ------------------------------------------------------------------- from PyTorch and back


def trained_in_pytorch(images, labels, steps=10):
    """A ResNet-20 after a few steps of SGD."""
    module = network("resnet20")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    module.train()
    for step in range(steps):
        batch = [(16 * step + i) % len(images) for i in range(16)]
        loss = F.cross_entropy(module(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


def wrong(module, images, labels):
    with torch.no_grad():
        return int(
            (module(nchw(np.float32(images) / 255)).argmax(1) != torch.from_numpy(labels)).sum()
        )


@pytest.mark.slow
def test_a_network_of_pytorch_is_fine_tuned_and_measured_in_pytorch_again(tmp_path):
    train_set = sources.load("mnist5k", "train[:64]")
    test_set = sources.load("mnist5k", "test[:48]")
    (x, y), (test_x, test_y) = (
        map(np.stack, zip(*(d.source[i] for i in range(len(d))), strict=True))
        for d in (train_set, test_set)
    )
    module = trained_in_pytorch(nchw(np.float32(x) / 255), torch.from_numpy(y))
    names = ("gaussian_noise", "fog", "pixelate")
    corrupted = {name: ada_jax.corrupt(name, 3, test_x) for name in names} | {"clean": test_x}
    state = {f"module.{name}": tensor for name, tensor in module.network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "resnet20.pt")

    weights, run = tmp_path / "resnet20.safetensors", tmp_path / "run"
    words = ("classifier", tmp_path / "resnet20.pt", weights, "--classifier=resnet20", *FLAGS)
    assert run_here("import_weights", *words).returncode == 0
    config = ["--config=experiments/quickstart.py:nominal", "--config.classifier=resnet20"]
    config += [f"--config.mean={MEAN}", f"--config.std={STD}", "--config.train_split=train[:64]"]
    config += ["--config.eval_split=test[:48]", "--config.batch_size=16", "--config.epochs=1"]
    config += ["--config.cpu_devices=0", "--config.eval_sets=('clean',)", "--config.log_steps=1"]
    config += ["--config.compilation_cache=", "--config.figure_examples=0"]
    done = run_here("train", *config, f"--config.init_weights={weights}", f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    assert run_here("export_weights", run, tmp_path / "out" / "robust.pt").returncode == 0
    tuned = runpy.run_path(str(tmp_path / "out" / "model.py"))["load"]()

    images = {name: jax.numpy.float32(x) / 255 for name, x in corrupted.items()}
    ours = scoring.load_classifier(run)
    for name, x in corrupted.items():
        predicted = np.argmax(ours(images[name]), 1)
        assert wrong(tuned, x, test_y) == (predicted != test_y).sum(), name
    results = json.loads((run / "results.json").read_text())
    assert wrong(tuned, test_x, test_y) == results["clean"]["wrong"]
    old, new = module.network.state_dict(), tuned.network.state_dict()
    assert new["bn1.num_batches_tracked"] == old["bn1.num_batches_tracked"] + 4
    assert not torch.equal(new["linear.weight"], old["linear.weight"])


# ------------------------------------------------------------------- files


def test_wrapped_dicts_and_prefixes_are_read_and_said(tmp_path):
    state = network("resnet20").network.state_dict()
    state = {f"module.{k}": t for k, t in state.items() if "num_batches" not in k}
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "in.pt")
    out = tmp_path / "out.safetensors"
    words = ("classifier", tmp_path / "in.pt", out, "--classifier=resnet20", *FLAGS)
    done = run_here("import_weights", *words)
    assert done.returncode == 0, done.stderr
    assert "reading the state dict under 'state_dict'" in done.stderr
    assert "Ignoring the prefix 'module' of all names" in done.stderr
    assert "resnet20 with 10 classes, 269,722 parameters" in done.stdout
    metadata = weight_files.load_weights(out)[1]
    assert metadata["classifier"] == "resnet20" and metadata["std"] == list(STD)
    assert_mistake(run_here("import_weights", *words), "exists and is not overwritten")


def test_a_normalisation_in_the_file_must_be_the_one_given(tmp_path):
    state = dict(network("resnet20").network.state_dict())
    state |= {"mu": torch.tensor(MEAN).view(1, 3, 1, 1), "sigma": torch.ones(1, 3, 1, 1)}
    torch.save(state, tmp_path / "in.pt")
    arguments = ("resnet20", str(tmp_path / "in.pt"), str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"The file's sigma is \[1.0, 1.0, 1.0\], and --std is"):
        import_weights.import_classifier(*arguments, MEAN, STD)
    import_weights.import_classifier(*arguments, MEAN, (1.0, 1.0, 1.0))
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "in.pt")
    with pytest.raises(UserError, match=r"The file's sigma is \[1.0, 1.0, 1.0\], and --std is"):
        import_weights.import_classifier(*arguments, MEAN, STD)
    import_weights.import_classifier(*arguments[:2], str(tmp_path / "2"), MEAN, (1.0, 1.0, 1.0))


def test_a_prefix_of_all_names_is_ignored_also_with_others_below_it():
    names = ("module.normalize.mean", "module.model.conv1.weight")
    found = import_weights._without_prefix(dict.fromkeys(names, 0))
    assert list(found) == ["normalize.mean", "model.conv1.weight"]
    assert import_weights._without_prefix({"module._orig_mod.a": 1, "module._orig_mod.b": 2}) == {
        "a": 1,
        "b": 2,
    }
    assert import_weights._without_prefix({}) == {}


def test_state_dicts_are_found_under_several_keys(tmp_path):
    state = {"a": torch.ones(2)}
    for i, content in enumerate(({"net": {"state_dict": state}}, {"model_state_dict": state})):
        torch.save(content | {"epoch": 3}, tmp_path / f"{i}.pt")
        assert list(import_weights.read_torch(tmp_path / f"{i}.pt")) == ["a"]


def test_a_new_network_has_no_layout(monkeypatch):
    monkeypatch.setitem(classifiers._NETWORKS, "vit4", classifiers._NETWORKS["resnet9"])
    with pytest.raises(UserError, match="'vit4' cannot be converted: only preact_resnet20"):
        torch_layouts.layout("vit4")


def test_the_unused_stage_of_trades_is_ignored(tmp_path):
    state = dict(network("wide_resnet40_2").network.state_dict())
    more = {k.replace("block1", "sub_block1"): t for k, t in state.items() if "block1" in k}
    trees = []
    for file, content in (("a.pt", state), ("b.pt", state | more)):
        torch.save(content, tmp_path / file)
        out = str(tmp_path / f"{file}.safetensors")
        import_weights.import_classifier("wide_resnet40_2", str(tmp_path / file), out, MEAN, STD)
        trees.append(weight_files.load_weights(out)[0])
    jax.tree.map(np.testing.assert_array_equal, *trees)


class Code:
    def __reduce__(self):
        return os.system, ("touch /tmp/ada_jax_ran_code",)


def written(path, kind):
    """Writes a file that is no state dict of resnet20."""
    state = dict(network("resnet20").network.state_dict())
    match kind:
        case "code":
            path.write_bytes(pickle.dumps({"conv1.weight": Code()}))
            return
        case "other":
            state = network("resnet9").network.state_dict()
        case "deeper":
            state = network("resnet56").network.state_dict()
        case "partial":
            state = {k: t for k, t in state.items() if not k.startswith("layer3.2")}
        case "nan":
            state["layer1.0.conv1.weight"][0] = torch.nan
        case "shape":
            state["linear.weight"] = torch.zeros(10, 65)
        case "headless":
            del state["linear.weight"], state["linear.bias"]
        case "list":
            state = [state["conv1.weight"]]
    torch.save(state, path)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("code", "holds more than tensors, which could execute code"),
        ("other", "'layer1.0.bn1.bias', is missing, expected [16]): it fits resnet9."),
        ("deeper", "'layer1.3.bn1.bias', of [16] is unexpected): it fits resnet56."),
        ("partial", "'layer3.2.bn1.bias', is missing, expected [64]): give the weights of this"),
        ("nan", "layer1.0.conv1.weight holds NaN or infinity"),
        ("shape", "'linear.weight', is [10,65], expected [10,64]"),
        ("headless", "'linear.bias', is missing"),
        ("list", "no state dict"),
    ],
)
def test_bad_files_are_rejected_in_a_sentence_and_nothing_is_written(tmp_path, kind, said):
    written(tmp_path / "in.pt", kind)
    words = ("classifier", tmp_path / "in.pt", tmp_path / "out", "--classifier=resnet20", *FLAGS)
    assert_mistake(run_here("import_weights", *words), said)
    assert os.listdir(tmp_path) == ["in.pt"] and not os.path.exists("/tmp/ada_jax_ran_code")


def test_bad_arguments_are_rejected_in_a_sentence(tmp_path):
    source, out = tmp_path / "in.pt", tmp_path / "out"
    torch.save({}, source)
    for words, said in (
        (FLAGS, "--classifier=None is unknown: choose one of"),
        (("--classifier=resnet50", *FLAGS), "'resnet50' cannot be converted: only"),
        (("--classifier=alexnet", *FLAGS), "'alexnet' cannot be converted: only"),
        (("--classifier=resnet20",), "--mean= must be three numbers"),
        (("--classifier=resnet20", "--mean=0,0,0", "--std=1,1,0"), "--std=1,1,0 must be three"),
        (("--classifier=resnet20", *FLAGS, "--export"), "use python -m ada_jax.export_weights"),
    ):
        assert_mistake(run_here("import_weights", "classifier", source, out, *words), said)
    assert os.listdir(tmp_path) == ["in.pt"]


def test_what_cannot_be_exported_is_rejected_in_a_sentence(tmp_path):
    def saved(file, **metadata):
        weight_files.save_weights(tmp_path / file, {"params": {}, "state": {}}, metadata)
        return tmp_path / file

    fields = {"classifier": "resnet50", "classes": 10, "mean": MEAN, "std": STD}
    haiku, old = saved("haiku", **fields), saved("old", classes=10)
    code = saved("code", **fields | {"classifier": "resnet9", "classes": "10 + 0 * print()"})
    before = sorted(os.listdir(tmp_path))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "model.py").touch()
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for words, said in (
        ((haiku,), "two arguments: RUN OUT"),
        ((haiku, tmp_path / "x.pth"), "does not end in .pt or .safetensors"),
        ((haiku, tmp_path / "x.pt"), "'resnet50' cannot be converted: only"),
        ((unfinished, tmp_path / "x.pt"), "train the run to its end first"),
        ((old, tmp_path / "x.pt"), "lacks the field 'classifier'"),
        ((code, tmp_path / "x.pt"), "classes='10 + 0 * print()' must be an integer"),
        ((tmp_path / "none", tmp_path / "x.pt"), "There is no weights file"),
        ((haiku, tmp_path / "taken" / "x.pt"), "model.py exists and is not overwritten"),
    ):
        assert_mistake(run_here("export_weights", *words), said)
    assert sorted(os.listdir(tmp_path)) == [*before, "taken", "unfinished"]


def test_the_definitions_are_in_the_package():
    models = pathlib.Path(export_weights.__file__).parent / "nets" / "torch_models"
    names = [n for n in classifiers.names() if n not in ("alexnet", "alexnet_small", "resnet50")]
    sources = {torch_layouts.layout(name).source for name in names}
    assert {file.name for file in models.glob("*.py")} <= sources
