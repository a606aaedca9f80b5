"""The report's page: its picture, its heat map, and how they look in a browser."""

import base64
import html
import itertools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import numpy as np
import PIL.Image
import pytest

from ada_jax import paths
from ada_jax import results as results_files
from ada_jax.report import grouping, label_places, overview, paper_tables, style, web_page
from ada_jax.report.tables import Cell, Table

CBAR = results_files.CBAR["cifar"]
SVG = "{http://www.w3.org/2000/svg}"


def row(label, clean, mce, *, method="", scale="resnet9, 12 epochs", seeds=1, tables=(), std=()):
    values, spread = {"clean": clean, "mce": mce}, dict(zip(("clean", "mce"), std, strict=False))
    return grouping.Row(label, method, values, spread, seeds, tables=tables, scale=scale)


@pytest.fixture(scope="module")
def shipped():
    """The rows of the shipped results, and the paper's."""
    files = [
        f for name in ("small", "gpu") for f in paths.glob(paths.EXPERIMENTS, f"results/{name}/*")
    ]
    ours = grouping.rows(result for file in files for result in results_files.read(str(file)))
    return ours, grouping.rows(results_files.read(str(results_files.PUBLISHED)))


# ------------------------------------------------------------------------ labels


def overlaps(boxes):
    pairs = itertools.combinations(boxes, 2)
    return [
        (a, b)
        for a, b in pairs
        if min(a[2], b[2]) - max(a[0], b[0]) > 0 and min(a[3], b[3]) - max(a[1], b[1]) > 0
    ]


def test_labels_are_in_the_plot_and_do_not_overlap():
    random = np.random.default_rng(0)
    points = random.normal((300, 200), (60, 15), (12, 2))
    sizes = np.stack([random.uniform(40, 120, 12), np.full(12, 16)], -1)
    marks = np.concatenate([points - 6, points + 6], -1)
    boxes = label_places.place(points, sizes, marks, (0, 0, 600, 400))
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], sizes)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (600, 400)).all()
    assert not overlaps(boxes)
    assert not any(overlaps([box, mark]) for box in boxes for mark in marks)


def test_a_lonely_label_is_beside_its_point():
    point, size = np.array([[50.0, 50.0]]), np.array([[40.0, 16.0]])
    (box,) = label_places.place(point, size, np.zeros((0, 4)), (0, 0, 200, 100))
    np.testing.assert_allclose(box, (57, 42, 97, 58))
    (box,) = label_places.place(point, size, np.zeros((0, 4)), (0, 0, 60, 100))
    assert box[2] <= 60  # There is no room to the right.


def test_labels_leave_out_what_all_rows_of_a_group_have():
    def short(*labels, seeds=1):
        return overview.short_labels(
            overview.Group("", "", [row(n, 1, 2, seeds=seeds) for n in labels])
        )

    assert short("cifar10_ada_small", "cifar10_nominal_small") == ["ada", "nominal"]
    assert short("a_b_c (ada.nu=0.02)", "a_b_c (ada.nu=0.03)", "a_d_c") == [
        "b (nu=0.02)",
        "b (nu=0.03)",
        "d",
    ]
    assert short("a_b", "a_b_b") == ["b", "b_b"]
    assert short(f"x_{30 * 'y'}{30 * 'w'}", "x_z") == [f"{23 * 'y'}…{23 * 'w'}", "z"]
    assert short("cifar10_ada_small") == ["cifar10_ada_small"]
    assert short("AdA (paper)", "AdA + AugMix (paper)", seeds=0) == ["AdA", "AdA + AugMix"]


# ------------------------------------------------------------------------ picture


def test_groups_are_of_one_network_and_duration():
    ours = [row("a", 1, 2), row("b", 3, 4, scale="resnet9, 24 epochs"), row("c", 5, 6)]
    unmeasured = grouping.Row("d", "", {"clean": 1.0}, {}, 1, scale="resnet9, 12 epochs")
    paper = [
        row("X (paper)", 7, 8, method="ada", seeds=0, tables=("1",), scale="paper: whole"),
        row("Y (paper)", 7, 8, method="pat_self", seeds=0, tables=("3",), scale="paper: others"),
    ]
    groups = overview.groups([*ours, unmeasured], paper)
    assert [(g.name, g.colour, [r.label for r in g.rows]) for g in groups] == [
        ("resnet9, 12 epochs", "c0", ["a", "c"]),
        ("resnet9, 24 epochs", "c1", ["b"]),
        ("paper: whole", "c-paper", ["X (paper)"]),
    ]
    assert len(overview.groups([], paper)) == 2
    assert len(overview.groups([row("e", 1, 2, method="pat_self")], paper)) == 3
    assert overview.groups([unmeasured], []) == []


def test_points_are_where_their_errors_are():
    rows = [row("a", 2, 4), row("b", 4, 8, std=(0.5, 1)), row("<c>", 8, 16, method="nominal")]
    groups = overview.groups([*rows, row("d", 8, 12, method="ada")], [])
    drawn = ET.fromstring(overview.document(groups))
    points = {
        group.find(f"{SVG}title").text.partition(":")[0]: [
            float(group.find(f"{SVG}circle").get(c)) for c in ("cx", "cy")
        ]
        for group in drawn.iter(f"{SVG}g")
        if group.find(f"{SVG}title") is not None
    }
    assert list(points) == ["a", "b", "<c>", "d"]
    a, b, c, d = (np.array(p) for p in points.values())
    np.testing.assert_allclose(c - a, 3 * (b - a), atol=0.2)
    assert c[0] == d[0] > a[0] and c[1] < d[1] < a[1]
    ticks = {t.text: t for t in drawn.iter(f"{SVG}text") if t.get("class") == "tick middle"}
    assert float(ticks["4"].get("x")) == pytest.approx(b[0], abs=0.11)
    (bars,) = (p for p in drawn.iter(f"{SVG}path") if p.get("class") == "spread")
    left, _, right, _, top, bottom = map(float, re.findall(r"[\d.]+", bars.get("d")))
    assert right - left == pytest.approx((b - a)[0] / 2, abs=0.2)  # 2 x 0.5 of 2 percent
    assert bottom - top == pytest.approx((a - b)[1] / 2, abs=0.2)
    arrows = [p.get("d") for p in drawn.iter(f"{SVG}path") if "arrow" in p.get("class")]
    assert len(arrows) == 1 and arrows[0].startswith(f"M{c[0]:.1f} {c[1] + 10:.1f}L")


@pytest.mark.parametrize(
    ("values", "ends"),
    [((2, 10), (0, 10.8)), ((10, 12), (9.7, 12.3)), ((5,), (0, 5.4)), ((0,), (0, 1))],
)
def test_axes_begin_at_zero_unless_half_of_them_would_be_empty(values, ends):
    assert overview._range(values) == pytest.approx(ends)


def test_key_figures_are_of_nominal_training_and_of_the_best_row():
    rows = [
        row("x_ada", 3, 10, method="ada"),
        row("x_none", 2, 20, method="nominal"),
        row("x_z", 5, 9),
    ]
    text = re.sub("<[^>]*>", " ", overview.figure(overview.groups(rows, [])))
    assert "20.0 → 9.0" in text and "nominal → z" in text and "clean error 2.0 → 5.0" in text
    alone = overview.figure(overview.groups(rows[1:2], []))
    assert "facts" not in alone and "<svg" in alone
    assert "An arrow" in text and "An arrow" not in alone
    others = [r._replace(measured_on="" if r.method == "nominal" else "others") for r in rows]
    apart = overview.figure(overview.groups(others, []))
    assert "facts" not in apart and "An arrow" not in apart
    one = overview.figure(overview.groups([*rows[:2], others[2]], []))
    assert "20.0 → 10.0" in one and "An arrow" in one


# ------------------------------------------------------------------------ heat map


def test_cells_are_coloured_by_their_place_between_the_extremes():
    lines = [
        [Cell("a"), Cell(50.0, 1, 2.0), Cell(30.0, 1)],
        [Cell("minus b"), Cell(99.0, 1, signed=True), Cell()],
    ]
    table = Table(
        "t",
        ["setup", "fog", "snow"],
        [lines, [[Cell("c"), Cell(10.0, 1), Cell()]]],
        spans=[("", 1), ("weather", 2)],
    )
    page = web_page.page("t", [table], [])
    cells = re.findall(
        r'<td class="shade"( style="--share: ([\d.]+)" title="([^"]*)")?>([^<]*)<', page
    )
    assert [(share, title, text) for _, share, title, text in cells] == [
        ("1.000", "50.0 ± 2.0", "50.0"),
        ("0.500", "30.0", "30.0"),
        ("", "", "+99.0"),
        ("", "", ""),
        ("0.000", "10.0", "10.0"),
        ("", "", ""),
    ]
    assert 'colspan="2">weather<' in page


def test_corruptions_have_the_papers_headings_above_them(shipped):
    table = paper_tables.table_3(*shipped)
    assert table.spans == [
        ("", 3),
        ("noise", 3),
        ("blur", 4),
        ("weather", 4),
        ("digital", 4),
        ("", 1),
    ]
    assert sum(count for _, count in table.spans) == len(table.head)
    assert not paper_tables.table_1(*shipped).spans
    cbar = shipped[0][0]._replace(values=shipped[0][0].values | dict.fromkeys(CBAR, 50.0))
    spans = paper_tables.table_3([cbar], []).spans
    assert spans[-2:] == [("C-bar", 10), ("", 1)]


# ------------------------------------------------------------------------ colours


def luminance(colour):
    """Relative luminance of [0,1] sRGB, by WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return np.dot((0.2126, 0.7152, 0.0722), linear)


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_has_enough_contrast(scheme):
    sheet = style.COLOURS.split("@media")[scheme]
    hexes = {k: v * 2 if len(v) == 3 else v for k, v in re.findall(r"--([\w-]+): #(\w+)", sheet)}
    rgb = {k: [int(v[i : i + 2], 16) / 255 for i in (0, 2, 4)] for k, v in hexes.items()}
    pairs = [("ink", "paper"), ("ink", "hot"), ("ink", "cold"), ("soft", "paper"), ("soft", "band")]
    pairs += [(name, "paper") for name in ("mark", "c0", "c1", "c2", "c3", "c-paper")]
    assert {
        pair: contrast(*(rgb[name] for name in pair))
        for pair in pairs
        if contrast(*(rgb[n] for n in pair)) < 4.5
    } == {}


# ------------------------------------------------------------------------ in a browser


PROBE = """<script>
window.errors = [];
window.addEventListener("error", e => window.errors.push(e.message), true);
document.addEventListener("securitypolicyviolation", e => window.errors.push(e.blockedURI));
</script>"""
# The page in a frame, since browsers have a least width of windows; and what is in it, as JSON.
FRAME = """<style>body { margin: 0 } iframe { border: 0; display: block }</style>
<iframe width="%d" height="1600"></iframe><pre>not loaded</pre><script>
const frame = document.querySelector("iframe");
const box = e => ["left", "top", "right", "bottom"].map(side => e.getBoundingClientRect()[side]);
frame.addEventListener("load", () => {
  const page = frame.contentDocument;
  const shown = [...page.querySelectorAll("svg")].filter(e => e.getBoundingClientRect().width);
  const look = e => frame.contentWindow.getComputedStyle(e);
  document.querySelector("pre").textContent = JSON.stringify({
    errors: frame.contentWindow.errors,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    background: look(page.body).backgroundColor,
    pictures: shown.map(box),
    labels: shown.flatMap(e => [...e.querySelectorAll(".label")].map(box)),
    names: shown.flatMap(e => [...e.querySelectorAll(".name")].map(box)),
    marks: shown.flatMap(e => [...e.querySelectorAll("title ~ .mark")].map(box)),
    size: Math.min(...shown.flatMap(e => [...e.querySelectorAll("text")].map(
      t => parseFloat(look(t).fontSize) * e.getScreenCTM().a))),
    cells: [...page.querySelectorAll("td.shade[style]")].map(
      e => [parseFloat(e.textContent), look(e).backgroundColor, look(e).color])});
});
frame.srcdoc = new TextDecoder().decode(Uint8Array.from(atob("%s"), c => c.charCodeAt(0)));
</script>"""


@pytest.fixture(scope="module")
def page(shipped):
    """The page of the shipped results, without pictures of matplotlib, and its rows."""
    groups = overview.groups(*shipped)
    shown = [make(*shipped) for make in (paper_tables.table_1, paper_tables.table_3)]
    colours = overview.colours(groups, itertools.chain(*shipped))
    return web_page.page("Robustness", shown, [], groups, colours), groups


def browse(page, width, dark, folder):
    """Shows the page in a frame; returns what the frame has, and the screenshot."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip(f"no browser is installed: none of {', '.join(names)}")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder}/profile", "--virtual-time-budget=5000"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    framed = folder / "frame.html"
    content = page.replace("<head>", "<head>" + PROBE, 1)
    framed.write_text(FRAME % (width, base64.b64encode(content.encode()).decode()))
    run = lambda *words: subprocess.run([*command, *words], capture_output=True, text=True)  # noqa: E731
    dom = run("--window-size=1400,1700", "--dump-dom", framed.as_uri()).stdout
    found = json.loads(html.unescape(re.search("<pre>(.*?)</pre>", dom, re.DOTALL)[1]))
    run("--window-size=1400,1700", f"--screenshot={folder}/page.png", framed.as_uri())
    with PIL.Image.open(folder / "page.png") as shot:
        return found, np.asarray(shot.convert("RGB"))


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, False), (1280, True)])
def test_the_page_in_a_browser(page, tmp_path, width, dark):
    content, groups = page
    found, shot = browse(content, width, dark, tmp_path)
    assert found["errors"] == [] and found["overflow"] == 0
    # One of the two pictures is shown. It is of readable size, and has a label for each row.
    (picture,) = found["pictures"]
    rows = sum(len(group.rows) for group in groups)
    assert len(found["labels"]) == len(found["marks"]) == rows > 20
    assert len(found["names"]) == 3 and found["size"] >= 10
    assert all(right - left > 8 for left, _, right, _ in found["marks"])
    texts = found["labels"] + found["names"]
    assert overlaps(texts) == []
    assert sum(len(overlaps([label, m])) for label in found["labels"] for m in found["marks"]) < 5
    assert all(
        picture[0] <= t[0] and t[2] <= picture[2] <= width and picture[1] <= t[1] for t in texts
    )
    left, top, right, bottom = map(round, picture)
    assert bottom < 1600
    drawn = shot[top:bottom, left:right].reshape(-1, 3).astype(int)
    background = np.array([int(c) for c in re.findall(r"\d+", found["background"])])
    assert background.mean() < 40 if dark else background.mean() > 240
    differs = np.abs(drawn - background).max(-1) > 40
    assert 0.01 < differs.mean() < 0.3
    assert len(np.unique(drawn[differs], axis=0)) > 50  # Marks of three colours, and text.
    # The greater an error, the more its cell differs from the background; its number is readable.
    assert len(found["cells"]) > 300
    rgb = lambda colour: [float(c) for c in re.findall(r"[\d.]+", colour)[:3]]  # noqa: E731
    errors = np.array([error for error, _, _ in found["cells"]])
    colours = np.array([rgb(colour) for _, colour, _ in found["cells"]])
    assert colours.max() <= 1  # color(srgb r g b)
    distances = np.abs(colours - background / 255).sum(-1)[np.argsort(errors)]
    assert (np.diff(distances) > -0.03).all() and distances[-1] > distances[0] + 0.3
    inks = [np.array(rgb(ink)) / 255 for _, _, ink in found["cells"]]
    assert min(map(contrast, inks, colours)) >= 4.5
