"""Reports: what is read and refused, how seeds are joined, the paper's tables, the page."""

import csv
import io
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from ada_jax import results as results_files
from ada_jax.corruptions import parameter_tables
from ada_jax.errors import UserError
from ada_jax.report import charts, figures, grouping, paper_tables, robustbench, tables, web_page
from ada_jax.report.tables import Cell, Table
from tests.conftest import assert_mistake, run_here

ALL = results_files.NAMES + results_files.EXTRA

# Rows of the paper's table 3, which agree with the means of RobustBench's grid: clean error, mCE,
# then the 15 in the standard order.
BEST = (5.07, 7.83) + (8.80, 7.77, 11.21, 5.93, 10.69, 7.31, 6.49, 8.49, 6.71, 8.66, 5.20, 6.17)
BEST += (8.55, 7.63, 7.83)
ADA = (3.82, 12.49) + (25.8, 19.8, 29.9, 9.3, 15.6, 10.9, 9.6, 9.3, 8.1, 8.8, 4.3, 11.0, 9.3)
ADA += (6.7, 9.2)


def result(name="cifar10_ada_small", seed=0, shift=0.0, names=ALL, **fields):
    """What evaluating a made-up run writes: errors grow with severity and with the corruption."""
    entry = lambda wrong: {"examples": 1000, "wrong": wrong, "error": wrong / 10}  # noqa: E731
    grid = {
        c: [
            {"severity": s} | entry(int(100 + 10 * ALL.index(c) + 20 * s + shift))
            for s in range(1, 6)
        ]
        for c in names
    }
    mean = lambda names: np.mean([e["error"] for c in names for e in grid[c]])  # noqa: E731
    means = {}
    for field, needed in (
        ("mce_unnormalised", results_files.NAMES),
        ("mean_extra", results_files.EXTRA),
    ):
        if set(needed) <= set(names):
            means[field] = float(mean(needed))
    return {
        "schema": 1,
        "name": name,
        "published": False,
        "seed": seed,
        "step": 2106,
        "config": {"seed": seed, "method": "ada", "epochs": 6.0, "ada": {"nu": 0.02}},
        "commit": "0123456789abcdef",
        "device": "cpu",
        "devices": 2,
        "seconds": 75.0,
        "weights_digest": "fedcba9876543210",
        "data": {"name": "cifar10", "split": "train[45000:]", "examples": 1000},
        "clean": entry(int(90 + shift)) | {"loss": 0.3},
        "corruptions": grid,
        "corruption_source": {"kind": "on_the_fly", "seed": 0, "table": "cifar"},
        **means,
    } | fields


def full_size(**config):
    """A result that is comparable to the paper's, of its test images, network and epochs."""
    images = {"name": "cifar10", "split": "test", "examples": 10_000}
    scale = {"method": "ada", "classifier": "preact_resnet50", "epochs": 300.0, "seed": 0}
    return result("cifar10_ada", data=images, config=scale | config)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def read(tmp_path, *contents):
    files = [write(tmp_path / f"{i}.json", content) for i, content in enumerate(contents)]
    return [r for file in files for r in results_files.read(str(file))]


@pytest.fixture(scope="module")
def paper():
    return grouping.rows(results_files.read(str(results_files.PUBLISHED)))


def cells(table, label):
    """The numbers of the line with this label."""
    return [c.value for c in next(li for li in table.lines if li[0].value == label)[1:-1]]


# ------------------------------------------------------------------------ the paper


def test_the_published_grid_has_an_mce_of_7_829():
    best = json.loads(results_files.PUBLISHED.read_text())["rows"][0]
    del best["mce_unnormalised"]
    assert results_files.flatten("", best)["mce"] == pytest.approx(7.829, abs=5e-4)


def test_the_papers_table_3_comes_out_of_the_shipped_file(paper):
    table = paper_tables.table_3([], paper)
    assert len(table.lines) == 7 and len(table.head) == 1 + 2 + 15 + 1
    np.testing.assert_allclose(cells(table, "AdA (paper)"), ADA, atol=1e-9)
    best = cells(table, "AdA + DeepAugment (10x) + AugMix (paper)")
    np.testing.assert_allclose(best, BEST, atol=0.0051)
    for line in table.lines:  # what was read by machine adds up
        _, mce, *each = [c.value for c in line[1:-1]]
        assert np.mean(each) == pytest.approx(mce, abs=0.05)


def test_the_papers_table_1_is_sorted_by_mce_and_leaves_empty_what_is_not_known(paper):
    table = paper_tables.table_1([], paper)
    found = {line[0].value.removesuffix(" (paper)"): line[2].value for line in table.lines}
    assert list(found.values()) == sorted(found.values()) and len(found) == 10
    assert (found["Nominal"], found["AugMix"], found["AdA + AugMix"]) == (25.17, 13.13, 8.8)
    line = next(li for li in tables.markdown(table).splitlines() if "| Nominal" in li)
    assert [w.strip() for w in line.split("|")[2:-1]] == [
        "4.23",
        "25.17",
        "",
        "",
        "",
        "",
        "10.35",
        "",
    ]


def test_cifar10_1_errors_are_of_whole_images_and_mce_never_beats_the_clean_error(paper):
    for row in json.loads(results_files.PUBLISHED.read_text())["rows"]:
        if "cifar10_1" in row:
            assert (row["cifar10_1"]["error"] * 20) % 1 == pytest.approx(0, abs=1e-9)
        assert row["clean"]["error"] < row["mce_unnormalised"]
    assert {row.method for row in paper if "1" in row.tables} == {
        "+".join(words)
        for words in (
            *[("nominal",), ("augmix",), ("deepaugment",), ("deepaugment10x",), ("ada",)],
            *[("deepaugment", "augmix"), ("deepaugment10x", "augmix"), ("ada", "augmix")],
            *[("ada", "deepaugment", "augmix"), ("ada", "deepaugment10x", "augmix")],
        )
    }


@pytest.mark.parametrize(
    ("trained", "copies", "augmix", "expected"),
    [
        ("nominal", 0, False, "nominal"),
        ("ada", 0, False, "ada"),
        ("nominal", 1, True, "deepaugment+augmix"),
        ("ada", 10, True, "ada+deepaugment10x+augmix"),
        ("nominal", 3, True, ""),
        ("pgd", 0, False, ""),
        (None, 0, False, ""),
    ],
)
def test_the_config_alone_says_which_row_of_the_paper_is_meant(trained, copies, augmix, expected):
    config = {"deepaugment": {"copies": copies}, "augmix": {"use": augmix}}
    assert grouping.method(config | ({"method": trained} if trained else {})) == expected


@pytest.mark.parametrize(
    "ingredient",
    [
        {"trivial_augment": {"use": True, "extra_ops": True}},
        {"noise": {"share": 0.5, "norms": ["l2"]}},
        {"mixup": {"alpha": 1.0, "layers": ["input"]}},
        {"label_smoothing": 0.1},
        {"augmix": {"use": True, "clean_view": True}},
        {"augmix": {"use": True, "jsd_weight": 12.0}},
        {"ada": {"group": 16}},
        {"ada": {"every": 2}},
        {"ada": {"leaves": "b$"}},
    ],
)
def test_rows_with_ingredients_that_the_paper_lacks_are_none_of_its_rows(ingredient, tmp_path):
    config = result()["config"]
    one, other = read(tmp_path, result(), result(config=config | ingredient))
    assert grouping.paper_row(one) == "ada" and grouping.paper_row(other) == ""


def test_averaged_weights_are_none_of_the_paper_s_rows(tmp_path):
    config = result()["config"] | {"ema_decay": 0.9}
    last, averaged = read(tmp_path, result(config=config), result("cifar10_ada_ema", config=config))
    assert grouping.paper_row(last) == "ada" and grouping.paper_row(averaged) == ""


@pytest.mark.parametrize(
    ("network", "augmix", "expected"),
    [
        ("self", False, "pat_self"),
        ("alexnet_small", False, "pat_alexnet"),
        ("resnet9", False, ""),
        ("self", True, ""),
    ],
)
def test_rows_of_pat_are_those_of_table_3(network, augmix, expected):
    config = {"method": "pat", "pat": {"network": network}, "augmix": {"use": augmix}}
    assert grouping.method(config) == expected


# ------------------------------------------------------------------------ our results


def test_differences_are_ours_minus_the_papers(tmp_path, paper):
    ours = grouping.rows(read(tmp_path, full_size()))
    table = paper_tables.table_3(ours, paper)
    mine, theirs, minus = (
        cells(table, label) for label in ("cifar10_ada", "AdA (paper)", "minus AdA (paper)")
    )
    # The extra four are measured here and not known of the paper.
    assert len(mine) == 2 + 19 and theirs[17:] == minus[17:] == [None] * 4
    np.testing.assert_allclose(np.subtract(mine[:17], theirs[:17]), minus[:17], atol=1e-9)
    assert mine[1] == pytest.approx(10 + 7 + 6)
    together = next(g for g in table.groups if g[0][0].value == "cifar10_ada")
    assert together[1][0].value == "minus AdA (paper)"
    assert not any("minus" in li[0].value for li in paper_tables.table_3(ours, []).lines)
    listed = paper_tables.table_list(read(tmp_path, full_size()), paper).lines[0]
    assert [tables.text(c) for c in listed[2:5]] == ["23.00", "12.49", "+10.51"]


@pytest.mark.parametrize(
    "other",
    [
        result(data={"name": "digits", "split": "test", "examples": 10_000}),
        full_size() | {"data": {"name": "cifar10", "split": "test", "examples": 5000}},
        full_size() | {"data": {"name": "cifar10", "split": "train[40000:]", "examples": 10_000}},
        full_size(classifier="preact_resnet18"),
        full_size(epochs=20.0),
        full_size(method="pat", pat={"network": "self"}),
    ],
)
def test_other_images_networks_and_epochs_have_no_difference_from_the_papers(
    other, tmp_path, paper
):
    results = read(tmp_path, other)
    ours = grouping.rows(results)
    for table in (paper_tables.table_1(ours, paper), paper_tables.table_3(ours, paper)):
        assert not any("minus" in li[0].value for li in table.lines)
    assert "difference" not in paper_tables.table_list(results, paper).head
    both = paper_tables.table_list(results + read(tmp_path, full_size()), paper)
    assert {tables.text(line[4]) for line in both.lines} == {"", "+10.51"}


def test_pat_is_compared_at_its_own_number_of_epochs(tmp_path):
    pat = full_size(method="pat", pat={"network": "self"}, epochs=100.0)
    (row,) = grouping.rows(read(tmp_path, pat))
    assert row.comparable and row.method == "pat_self"


def test_a_row_has_the_papers_numbers_beside_it(tmp_path, paper):
    beside = paper_tables.table_beside(grouping.rows(read(tmp_path, result())), paper)
    assert beside.head[:5] == [
        *("setup", "clean error", "clean error, paper", "mCE, un-normalised", "mCE, paper")
    ]
    assert [cell.value for cell in beside.lines[0][2:5]] == [3.82, pytest.approx(23), 12.49]
    digits = result(data={"name": "digits", "split": "test", "examples": 1000})
    other = grouping.rows(read(tmp_path, digits))
    assert paper_tables.table_beside(other, paper).lines[0][4].value is None


def test_seeds_are_joined_with_mean_and_deviation(tmp_path):
    contents = [result(seed=seed, shift=shift) for seed, shift in ((0, 0), (1, 10), (2, 50))]
    (row,) = grouping.rows(read(tmp_path, *contents))
    assert row.seeds == 3 and row.label == "cifar10_ada_small"
    assert row.values["clean"] == pytest.approx(9 + 2)
    assert row.spread["clean"] == pytest.approx(np.std([0, 1, 5], ddof=1))
    table = paper_tables.table_1([row], [])
    first = [tables.text(cell) for cell in table.lines[0]]
    assert first[-1] == "3" and first[1] == "11.00 ± 2.65"
    records = list(csv.DictReader(io.StringIO(tables.csv(table))))
    assert float(records[0]["clean error, std"]) == pytest.approx(7**0.5, abs=1e-6)


def test_other_settings_under_one_name_are_kept_apart_and_said(tmp_path):
    other = result()
    other["config"] = other["config"] | {"ada": {"nu": 0.03}}
    half = result()
    for entry in (e for entries in half["corruptions"].values() for e in entries):
        entry["examples"], entry["wrong"] = 500, entry["wrong"] / 2
    found = grouping.rows(read(tmp_path, result(), other, half))
    assert {row.label for row in found} == {
        f"cifar10_ada_small (corrupted={n}, ada.nu={nu})"
        for n, nu in ((1000, 0.02), (1000, 0.03), (500, 0.02))
    }
    words = "1000 images of cifar10, split train[45000:], {}corrupted by ada_jax"
    assert {row.measured_on.partition(" (")[0] for row in found} == {
        words.format(""),
        words.format("500 of them "),
    }


def test_an_ingredient_that_others_lack_is_said_by_its_switch(tmp_path):
    def label(*radii):
        configs = [{}, *({"noise": {"share": 0.5, "radii": {"l2": radius}}} for radius in radii)]
        contents = [result(config=result()["config"] | config) for config in configs]
        return {row.label for row in grouping.rows(read(tmp_path, *contents))}

    name = "cifar10_ada_small"
    without = f"{name} (noise.share=0.0)"  # All others have it.
    assert label(0.1) == {without, f"{name} (noise.share=0.5)"}
    both = {f"{name} (noise.share=0.5, noise.radii.l2={radius})" for radius in (0.1, 0.2)}
    assert label(0.1, 0.2) == {without, *both}


def test_a_switch_that_only_some_others_have_on_is_not_said_where_it_is_off(tmp_path):
    added = [{}, {"noise": {"share": 0.5}}, {"mixup": {"alpha": 1.0}}]
    contents = [result(config=result()["config"] | config) for config in added]
    assert {row.label for row in grouping.rows(read(tmp_path, *contents))} == {
        "cifar10_ada_small",
        "cifar10_ada_small (noise.share=0.5)",
        "cifar10_ada_small (mixup.alpha=1.0)",
    }


def test_networks_that_only_one_method_has_are_not_said_and_flags_are_named_alone(tmp_path):
    data, flag = {"data": "a" * 64}, {"cross_replica_bn": True}
    ada = result(training=data | {"corruption_nets": "b" * 64})
    nominal = result(config=ada["config"] | {"method": "nominal"} | flag, training=data)
    assert {row.label for row in grouping.rows(read(tmp_path, ada, nominal))} == {
        "cifar10_ada_small (method=ada)",
        "cifar10_ada_small (method=nominal, cross_replica_bn)",
    }


def test_runs_from_before_there_were_crops_are_joined_with_those_after(tmp_path):
    after = result(seed=1)
    after["config"] |= {"crop_scale": [], "crop_ratio": [0.75, 1.3333]}
    (row,) = grouping.rows(read(tmp_path, result(), after))
    assert row.seeds == 2
    after["config"] |= {"crop_scale": [0.08, 1.0]}
    assert len(grouping.rows(read(tmp_path, result(), after))) == 2


@pytest.mark.parametrize(
    ("field", "default", "other"),
    [("every", 1, 2), ("group", 1, 2), ("leaves", "", "b$"), ("choice", ["delta"], ["mixing"])],
)
def test_runs_from_before_a_later_field_are_those_with_its_default(tmp_path, field, default, other):
    after = result(seed=1)
    for value, rows in ((default, 1), (other, 2)):
        after["config"]["ada"] = {"nu": 0.02, field: value}
        assert len(grouping.rows(read(tmp_path, result(), after))) == rows


def test_an_mce_relative_to_alexnet_needs_all_corruptions(tmp_path):
    content = result(mce_alexnet=1.0)
    content["corruptions"].pop("fog")
    (read_back,) = read(tmp_path, content)
    assert "mce_alexnet" not in read_back.values


def test_runs_from_other_initial_weights_without_digests_are_not_seeds(tmp_path):
    runs = [result(seed=seed) for seed in (0, 1)]
    for run in runs:
        run["config"] |= {"init_weights": f"runs/{run['seed']}"}
    assert len(grouping.rows(read(tmp_path, *runs))) == 2
    for run in runs:
        run["training"] = {"init_weights": "b" * 64}
    assert len(grouping.rows(read(tmp_path, *runs))) == 1


@pytest.mark.parametrize("part", ["data", "deepaugment", "corruption_nets", "init_weights"])
def test_runs_that_were_trained_from_something_else_are_not_seeds(tmp_path, part):
    training = {"data": "a" * 64, part: "b" * 64}
    seeds = [result(seed=seed, training=training) for seed in (0, 1)]
    other = result(seed=2, training=training | {part: "c" * 64})
    found = {row.label: row.seeds for row in grouping.rows(read(tmp_path, *seeds, other))}
    label = f"cifar10_ada_small (training.{part}="
    assert found == {label + "b" * 12 + ")": 2, label + "c" * 12 + ")": 1}
    # Files of older versions say nothing of it.
    old = [result(seed=seed) for seed in (3, 4)]
    counts = sorted(row.seeds for row in grouping.rows(read(tmp_path, *seeds, *old)))
    assert counts == [2, 2]


def test_runs_that_were_measured_on_other_images_are_not_seeds(tmp_path):
    def of(seed, fog, folder, **data):
        source = {"kind": "npy", "folder": folder, "files": {"labels": "l" * 64, "fog": fog * 64}}
        return result(seed=seed, corruption_source=source)

    (row,) = grouping.rows(read(tmp_path, of(0, "a", "x"), of(1, "a", "y")))
    assert row.seeds == 2
    assert len(grouping.rows(read(tmp_path, of(0, "a", "x"), of(1, "b", "x")))) == 2
    measured = [
        result(seed=seed, data=result()["data"] | {"fingerprint": digest * 64})
        for seed, digest in enumerate("ab")
    ]
    labels = [row.label for row in grouping.rows(read(tmp_path, *measured))]
    assert labels == [f"cifar10_ada_small (data.fingerprint={12 * digest})" for digest in "ab"]


def test_images_are_not_said_to_be_corrupted_before_they_are(tmp_path):
    words = "1000 images of cifar10, split train[45000:]"
    (row,) = grouping.rows(read(tmp_path, result(corruptions={})))
    assert row.measured_on == words
    more = result()
    cell = more["corruptions"]["fog"][0]
    cell["examples"], cell["wrong"] = 2 * cell["examples"], 2 * cell["wrong"]
    (row,) = grouping.rows(read(tmp_path, more))
    assert row.measured_on.startswith(f"{words}, some of them corrupted by ada_jax")


def test_images_that_were_trained_on_are_said_to_be(tmp_path):
    (row,) = grouping.rows(read(tmp_path, result(trained_on=400)))
    said = "1000 images of cifar10, split train[45000:], 400 of them TRAINED ON, corrupted by"
    assert row.measured_on.startswith(said)


def test_imagenet_has_a_column_relative_to_alexnet_and_others_have_not(tmp_path):
    of_imagenet = result(mce_alexnet=1.0)  # is computed anew
    table = paper_tables.table_1(grouping.rows(read(tmp_path, of_imagenet)), [])
    column = table.head.index("mCE, AlexNet's errors as 100%")
    means = [
        np.mean([e["error"] for e in of_imagenet["corruptions"][n]]) for n in results_files.NAMES
    ]
    expected = np.mean(np.array(means) / list(parameter_tables.ALEXNET_ERRORS.values()))
    assert table.lines[0][column].value == pytest.approx(expected)
    assert not any("AlexNet" in word for word in paper_tables.table_1(grouping.rows([]), []).head)


def test_the_same_result_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"0\.json and .*1\.json have the same .*seed=0"):
        grouping.rows(read(tmp_path, result(), result()))


def test_sets_that_were_not_evaluated_are_empty_cells(tmp_path):
    bare = {k: v for k, v in result("bare").items() if "corruption" not in k and k[0] != "m"}
    some = result("some", names=results_files.NAMES[:4])
    whole = result("whole")
    for table in (
        make(grouping.rows(read(tmp_path, bare, some, whole)), [])
        for make in (paper_tables.table_1, paper_tables.table_3)
    ):
        assert table.lines[0][0].value == "whole"
        assert cells(table, "bare")[1:] == [None] * (len(table.head) - 3)
        assert cells(table, "some")[1] is None
    assert cells(table, "some")[2:6] == pytest.approx([16, 17, 18, 19])
    assert ",,,," in tables.csv(table) and "|  " in tables.markdown(table)
    partial = result()
    partial["corruptions"]["fog"].pop()
    del partial["mce_unnormalised"]
    (row,) = grouping.rows(read(tmp_path, partial))
    assert "fog/1" in row.values and not {"fog", "weather", "mce", "mce/5"} & row.values.keys()


def test_every_seed_must_have_a_value_that_is_averaged(tmp_path):
    (row,) = grouping.rows(read(tmp_path, result(), result(seed=1, names=results_files.NAMES)))
    assert "mce" in row.values and "extra" not in row.values


# ------------------------------------------------------------------------ formats


def test_formats_escape_what_they_must():
    table = Table("t", ["a|b", "50% & x_1"], [[[Cell("<b>_x_|y"), Cell(1.25, 1, 0.5)]]], ["n_1"])
    assert r"\<b>\_x\_\|y" in tables.markdown(table) and "1.2 ± 0.5" in tables.markdown(table)
    latex = tables.latex(table)
    assert r"50\% \& x\_1" in latex and r"1.2 $\pm$ 0.5 \\" in latex and r"{lr}" in latex
    assert tables.csv(table) == 'a|b,50% & x_1,"50% & x_1, std"\n<b>_x_|y,1.25,0.5'
    page = web_page.page("<title>", [table], [])
    assert "<b>" not in page and "&lt;b&gt;_<wbr>x_<wbr>|y" in page


def test_names_of_runs_are_no_markup():
    table = Table("t", ["name"], [[[Cell("$5_to_$10 ~~a~~ &lt; R&D\nb|c<d>")]]])
    line = tables.markdown(table).splitlines()[-1]
    assert line == r"| \$5_to\_\$10 \~\~a\~\~ \&lt; R&D b\|c\<d> |"
    words = r"\$5\_to\_\$10 \textasciitilde{}\textasciitilde{}a\textasciitilde{}\textasciitilde{} "
    words += r"\&lt; R\&D b\textbar{}c\textless{}d\textgreater{} \\"
    assert words in tables.latex(table).splitlines()


# ------------------------------------------------------------------------ pictures


RECORDS = [
    {"step": step, "kind": "corruptions", "mce": 20.0}
    | {f"error/{c}/{s}": 50 - 10 * i + s for c in ("fog", "snow") for s in (1, 3)}
    for i, step in enumerate((100, 200, 300))
]


def test_figure_2_shows_accuracies_averaged_over_severities():
    steps, accuracies = charts.through_training(RECORDS)
    assert steps == [100, 200, 300] and list(accuracies) == ["snow", "fog"]
    np.testing.assert_allclose(accuracies["fog"], [48, 58, 68])
    lacking = [{"step": 50, "kind": "corruptions", "error/frost/1": 3.0}, *RECORDS]
    assert math.isnan(charts.through_training(lacking)[1]["fog"][0])
    assert charts.through_training([]) == ([], {})


def test_figure_2_is_scaled_over_its_columns_and_over_its_rows():
    values = np.array([[10.0, 20, 30], [50, 40, np.nan], [30, 30, 30]])
    columns, rows = figures._scaled(values, 0), figures._scaled(values, 1)
    np.testing.assert_allclose(columns, [[0, 0, 1], [1, 1, np.nan], [0.5, 0.5, 1]])
    np.testing.assert_allclose(rows, [[0, 0.5, 1], [1, 0, np.nan], [1, 1, 1]])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A report with everything in it: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("report")
    runs = [result(seed=0), result(seed=1, shift=9), result("cifar10_nominal_small", shift=80)]
    runs[2]["config"]["method"] = "nominal"
    runs[0]["ada"] = {"edsr_small": {"examples": 64, "error": 20.0, "ssim": 0.99}}
    for i, content in enumerate(runs):
        write(folder / f"run{i}" / "results.json", content)
    (folder / "run0" / "metrics.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    figures.training_maps(str(folder / "run0/adversarial_edsr_small.png"), [1], {"fog": [3.0]})
    runs = [folder / f"run{i}" for i in range(3)]
    done = run_here("report", *runs, "--paper", f"--figures={folder}/out")
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout


def test_averaged_weights_have_pictures_of_their_own(tmp_path):
    for suffix in ("", "_ema"):
        content = result(f"net{suffix}", ada={"edsr_small": {"examples": 64, "error": 20.0}})
        write(tmp_path / f"results{suffix}.json", content)
        (tmp_path / f"adversarial_edsr_small{suffix}.png").touch()
    found = [results_files.read(str(tmp_path / f"results{s}.json"))[0] for s in ("", "_ema")]
    for one, picture in zip(found, charts._pairs(found), strict=True):
        suffix = one.fields["name"].removeprefix("net")
        assert picture.path == str(tmp_path / f"adversarial_edsr_small{suffix}.png")
        assert f"net{suffix}, seed 0, attacked through edsr_small:" in picture.alt
        assert "20.00%" in picture.caption


def test_a_report_has_tables_figures_and_a_page_that_asks_for_nothing(drawn):
    out, printed = drawn
    assert printed.count("\n| cifar10_ada_small ") == 4  # tables 1 and 3, and two files
    assert "1000 images of cifar10, split train[45000:]" in printed
    names = {path.name for path in out.iterdir()}
    maps = {name for name in names if name.startswith("training_")}
    assert len(maps) == 1 and names - maps == {"overview.svg", "severities.png", "index.html"}
    page = (out / "index.html").read_text()
    assert page.count("<img ") == page.count('src="data:image/png;base64,') == 3
    loaded = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?://|src=\"(?!data:)|url\(|@import", loaded)
    assert "mean SSIM 0.990" in page and page.count("<table ") == 3
    assert all(alt for alt in re.findall(r'<img [^>]*alt="([^"]*)"', page))


# ------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.pop("schema"), "schema=None"),
        (lambda r: r.update(schema=2), "schema=2"),
        (lambda r: r.pop("seed"), "lacks the field 'seed'"),
        (lambda r: r["clean"].update(error=140.0), "error=140.0 for clean"),
        (lambda r: r["clean"].update(error=math.nan), "it has NaN, which is not JSON"),
        (lambda r: r["clean"].pop("error"), "error=None for clean"),
        (lambda r: r["corruptions"]["fog"][0].update(error=99.0), "error=99.0 for fog"),
        (lambda r: r["corruptions"]["fog"][0].update(severity=6), "the severities [6, 2, 3, 4, 5]"),
        (lambda r: r["corruptions"]["fog"][0].update(severity=2), "the severities [2, 2, 3, 4, 5]"),
        (lambda r: r["corruptions"].update(fog=3), "the severities 3 for fog"),
        (lambda r: r.update(mce_unnormalised=7.83), "mce_unnormalised=7.83"),
        (lambda r: r.update(corruptions=[]), "corruptions=[], which must be an object"),
        (lambda r: r.update(clean=[1]), "clean=[1], which must be an object"),
        (lambda r: r.update(config=None), "config=None, which must be an object"),
        (lambda r: r.update(lp=3), "lp=3, which must be an object"),
        (lambda r: r.update(published=True), "no list of rows"),
        (lambda r: r.update(name=3), "has a name or seed of another type"),
        (lambda r: r.update(seed=[1]), "has a name or seed of another type"),
        (lambda r: r.update(lp_accuracy={"l2": 3}), "has a value of a wrong type"),
        (lambda r: r["clean"].update(wrong="x"), "has a value of a wrong type"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_refused_by_name(tmp_path, change, said):
    content = result()
    change(content)
    file = write(tmp_path / "results.json", content)
    with pytest.raises(UserError) as error:
        results_files.read(str(tmp_path))
    assert said in str(error.value) and str(error.value).startswith(str(file))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "There are no results to report"),
        (["--paper", "--format=xml"], "--format=xml is unknown"),
        (["--paper", "--table=1,beside,4"], "--table=4 is unknown"),
        (["--paper", "--table=beside"], "--table=beside has nothing to show"),
        (["{}/nowhere"], "nowhere is not there"),
        (["{}/half.json"], "half.json is not whole JSON"),
        (["--paper", "--figures={}/half.json"], "half.json cannot be created"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words, said, tmp_path):
    half = json.dumps(result())[:-100]
    (tmp_path / "half.json").write_text(half)
    (tmp_path / "index.html").write_text("old")
    words = [f"--figures={tmp_path}", *(word.format(tmp_path) for word in words)]
    done = run_here("report", *words)
    assert_mistake(done, said)
    assert done.stderr.count("\n") == 1 and not done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"half.json", "index.html"}
    assert (tmp_path / "index.html").read_text() == "old"
    assert (tmp_path / "half.json").read_text() == half


def test_folders_without_results_are_left_out(tmp_path):
    (tmp_path / "a run").mkdir()
    (tmp_path / "images").mkdir()
    write(tmp_path / "a run" / "results.json", result())
    named = [str(tmp_path / "a run"), str(tmp_path / "images")]
    assert charts.with_results(named) == named[:1]
    assert charts.with_results(named[1:]) == named[1:]  # and is refused by name


def test_the_stored_profile_of_an_undefended_network_is_the_published_one():
    """Errors of a published ResNet-20 (8.3% clean error) on a set made by the original code."""
    published = (58, 46, 47, 21, 54, 28, 27, 24, 30, 17, 10, 31, 20, 33, 25)
    results = results_files.PUBLISHED.parent / "profile" / "nominal_30epochs_seed0.json"
    (result,) = results_files.read(str(results))
    ours = [result.values[name] for name in results_files.NAMES]
    order = [results_files.NAMES[i] for i in np.argsort(ours)]
    assert order[0] == "brightness" and result.values["clean"] < 11
    assert {*order[-4:]} == {"gaussian_noise", "shot_noise", "impulse_noise", "glass_blur"}
    assert scipy.stats.spearmanr(published, ours).statistic >= 0.9 - 1e-9


def test_table_2_is_of_the_seeds_that_were_attacked(tmp_path):
    contents = result(lp_accuracy={"linf": {"1/255": 40.0}}), result(seed=1)
    files = [tmp_path / f"{i}.json" for i in range(2)]
    for file, content in zip(files, contents, strict=True):
        file.write_text(json.dumps(content))
    printed = run_here("report", "--table=2", *files).stdout
    (row,) = [line for line in printed.splitlines() if "40.00" in line]
    assert row.split("|")[-2].strip() == "1"


def test_table_2_tells_different_numbers_of_attacked_images(tmp_path):
    ball = {"attacks": "AutoAttack", "accuracy": 40.0}
    contents = [
        result(seed=seed, lp={"linf": {"1/255": ball | {"examples": count}}})
        for seed, count in enumerate((400, 100))
    ]
    for seed, content in enumerate(contents):
        write(tmp_path / f"{seed}.json", content)
    found = results_files.read(str(tmp_path / "0.json")) + results_files.read(
        str(tmp_path / "1.json")
    )
    told = "AutoAttack on 100 to 400 images; standard errors are at most 5.0"
    assert grouping.attacked_on(found) == told


@pytest.mark.parametrize(("recipe", "rows"), [({"recipe": 1}, 1), ({}, 2)])
def test_corrupted_images_are_the_same_in_a_folder_of_ours(tmp_path, recipe, rows):
    made = {"seed": 0, "table": "cifar"} | recipe
    sources = (
        {"kind": "on_the_fly"} | made,
        {"kind": "npy", "folder": "/c", "files": {"snow": "a"}} | made,
    )
    found = []
    for seed, source in enumerate(sources):
        write(tmp_path / f"{seed}.json", result(seed=seed, corruption_source=source))
        found += results_files.read(str(tmp_path / f"{seed}.json"))
    assert len(grouping.rows(found)) == rows


def test_settings_of_another_method_do_not_split_rows(tmp_path):
    for seed, nu in enumerate((0.02, 0.005)):
        content = result("cifar10_nominal", seed=seed)
        content["config"] |= {"method": "nominal", "ada": {"nu": nu, "every": 2}}
        write(tmp_path / f"{seed}.json", content)
    found = [r for seed in range(2) for r in results_files.read(str(tmp_path / f"{seed}.json"))]
    (row,) = grouping.rows(found)
    assert (row.label, row.seeds, row.method) == ("cifar10_nominal", 2, "nominal")


def test_reports_start_without_jax():
    code = "import ada_jax.report.__main__, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ------------------------------------------------------------------------ RobustBench

# Of RobustBench/robustbench at commit 0e814568: model_info/cifar10/corruptions/
# Kireev2021Effectiveness_RLATAugMix.json, in its order, without the optional 'footnote'; and of
# commit fe235fb6: model_info/imagenet/corruptions/Standard_R50.json has 'corruptions_mce', too.
MODEL_INFO = ["link", "name", "authors", "additional_data", "number_forward_passes", "dataset"]
MODEL_INFO += ["venue", "architecture", "eps", "clean_acc", "reported", "corruptions_acc"]
# The first line of model_info/cifar10/corruptions/unaggregated_results.csv (commit c76809a0), each
# name five times there.
COLUMNS = "shot_noise motion_blur snow pixelate gaussian_noise defocus_blur brightness fog "
COLUMNS += "zoom_blur frost glass_blur impulse_noise contrast jpeg_compression elastic_transform"


def test_robustbench_gets_its_own_fields_and_columns(tmp_path):
    files = [
        write(tmp_path / "a.json", result(config={"classifier": "resnet20"})),
        write(tmp_path / "b.json", result(seed=3, shift=5, config={"classifier": "resnet20"})),
    ]
    done = run_here("report", *files, "--format=robustbench", f"--out={tmp_path / 'rb'}")
    assert done.returncode == 0, done.stderr
    name = "cifar10_ada_small"
    written = [f"{name}.json", f"{name}_seed3.json", "unaggregated_results.csv"]
    assert done.stdout.split() == [str(tmp_path / "rb" / file) for file in written]
    info = json.loads((tmp_path / "rb" / written[0]).read_text())
    assert list(info) == MODEL_INFO
    measured = json.loads(files[0].read_text())
    assert (info["dataset"], info["eps"], info["clean_acc"]) == ("cifar10", None, "91.00")
    assert info["corruptions_acc"] == f"{100 - measured['mce_unnormalised']:.2f}"
    names, severities, *lines = csv.reader(io.StringIO((tmp_path / "rb" / written[2]).read_text()))
    assert names == ["", *(name for name in COLUMNS.split() for _ in range(5))]
    assert severities == ["", *(15 * list("12345"))]
    assert [line[0] for line in lines] == [name, f"{name}_seed3"]
    accuracies = np.array(lines[0][1:], float)
    assert accuracies[5] == 1 - measured["corruptions"]["motion_blur"][0]["error"] / 100
    assert f"{100 * accuracies.mean():.2f}" == info["corruptions_acc"]
    assert "corrupted by ada_jax, not read from the published archive" in done.stderr
    assert "1,000 images were evaluated instead of 10,000" in done.stderr


def test_pandas_reads_the_table_as_robustbench_does(tmp_path):
    pandas = pytest.importorskip("pandas")
    text = robustbench.table(read(tmp_path, result()))
    table = pandas.read_csv(io.StringIO(text), header=[0, 1], index_col=0)
    assert table.shape == (1, 75) and table.index[0] == "cifar10_ada_small"
    assert table["fog"]["3"].item() == 1 - result()["corruptions"]["fog"][2]["error"] / 100
    assert pandas.DataFrame(table).to_csv() == text


def test_imagenets_model_info_has_the_mce_relative_to_alexnet(tmp_path):
    content = result(data={"name": "imagenet2012", "split": "validation", "examples": 50_000})
    (read_back,) = read(tmp_path, content | {"mce_alexnet": 0.0})
    assert list(robustbench.model_info(read_back)) == [*MODEL_INFO, "corruptions_mce"]


@pytest.mark.parametrize(
    ("changes", "flags", "said"),
    [
        ({}, (), "give --out=FOLDER with --format=robustbench"),
        ({"data": {"name": "digits", "examples": 9}}, ("--out=rb",), "is of the data set 'digits'"),
        ({"names": results_files.NAMES[1:]}, ("--out=rb",), "lacks gaussian_noise/1 and"),
        ({"clean": None}, ("--out=rb",), "lacks clean and RobustBench needs"),
        ({"name": "../a"}, ("--out=rb",), "name='../a' cannot name a file"),
        ({}, ("--out=rb", "--paper"), "--paper does not apply to --format=robustbench"),
    ],
)
def test_what_robustbench_cannot_take_is_rejected(tmp_path, changes, flags, said):
    content = {k: v for k, v in result(**changes).items() if v is not None}
    file = write(tmp_path / "a.json", content)
    flags = [flag.replace("rb", str(tmp_path / "rb")) for flag in flags]
    assert_mistake(run_here("report", file, "--format=robustbench", *flags), said)
    assert not list(tmp_path.glob("rb/*.json"))


def test_robustbench_takes_one_result_of_a_name(tmp_path):
    file = write(tmp_path / "a.json", result())
    words = ("report", file, file, "--format=robustbench", f"--out={tmp_path / 'rb'}")
    assert_mistake(run_here(*words), "has the models cifar10_ada_small, cifar10_ada_small")


def test_robustbench_takes_results_of_one_data_set(tmp_path):
    other = result("b", data={"name": "imagenet2012", "split": "validation", "examples": 50_000})
    files = [write(tmp_path / f"{r['name']}.json", r) for r in (result("a"), other)]
    words = ("report", *files, "--format=robustbench", f"--out={tmp_path / 'rb'}")
    assert_mistake(run_here(*words), "has results of cifar10, imagenet2012")
