"""Figures, drawn with matplotlib."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from ada_jax import paths


def adversarial_rows(
    path: str,
    *,
    clean: np.ndarray,
    augmented: np.ndarray,
    similarity: np.ndarray | None,
    label: np.ndarray,
    clean_prediction: np.ndarray,
    augmented_prediction: np.ndarray,
    class_names: Sequence[str],
    columns: int = 10,
) -> None:
    """Draws rows of clean images, augmented images and differences (x5), like figure 1a.

    Args:
      path: PNG to write.
      clean: images [B,H,W,C] in [0,1]; the first `columns` are drawn.
      augmented: as clean.
      similarity: SSIM [B]; None for images smaller than its window.
      label: true classes [B].
      clean_prediction: predicted classes of the clean images [B]; wrong ones are printed red.
      augmented_prediction: predicted classes of the augmented images [B].
      class_names: names of the classes.
      columns: maximum number of columns.
    """
    from matplotlib.figure import Figure  # Slow to import.

    count = min(columns, len(clean))
    figure = Figure(figsize=(1.25 * count, 4.4), layout="constrained")
    axes = figure.subplots(3, count, squeeze=False)
    difference = np.clip(0.5 + 5 * (augmented - clean), 0, 1)
    for i in range(count):
        rows = (clean[i], augmented[i], difference[i])
        titles = (
            _plain(class_names[clean_prediction[i]]),
            _plain(class_names[augmented_prediction[i]]),
            "" if similarity is None else f"SSIM {similarity[i]:.2f}",
        )
        wrong = (clean_prediction[i] != label[i], augmented_prediction[i] != label[i], False)
        for axis, image, title, red in zip(axes[:, i], rows, titles, wrong, strict=True):
            axis.imshow(np.clip(image, 0, 1), interpolation="nearest", vmin=0, vmax=1)
            axis.set_title(title, fontsize=9, color="crimson" if red else "black")
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, name in zip(axes[:, 0], ("clean", "AdA", "difference x5"), strict=True):
        axis.set_ylabel(name, fontsize=10)
    _save(figure, path)


def contact_sheet(path: str, columns: dict[str, np.ndarray]) -> None:
    """Draws images in rows, with one column per rendering.

    Args:
      path: PNG to write.
      columns: images [N,H,W,3] uint8 by the column's title.
    """
    from matplotlib.figure import Figure

    count = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.25 * len(columns), 1.2 * count + 0.3), layout="constrained")
    axes = figure.subplots(count, len(columns), squeeze=False)
    for column, (title, images) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(_words(title), fontsize=9)
        for axis, image in zip(column, images, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_axis_off()
    _save(figure, path)


def ssim_densities(path: str, results: dict[str, dict[str, dict]]) -> None:
    """Draws the density of SSIM at each radius, one panel per network (paper, figure 1b).

    Args:
      path: PNG to write.
      results: dicts with 'values', a list of SSIMs, by network and radius.
    """
    import scipy.stats
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(results), 3.4), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, (net, by_radius) in zip(panels, results.items(), strict=True):
        drawn = {nu: np.asarray(entry["values"]) for nu, entry in by_radius.items() if nu != "0"}
        low = min(np.quantile(values, 0.02) for values in drawn.values())
        grid = np.linspace(low, 1, 400)
        densities = {nu: scipy.stats.gaussian_kde(v)(grid) for nu, v in drawn.items()}
        for nu, density in densities.items():
            axis.plot(grid, density, label=f"$\\nu$ = {nu}")
            axis.fill_between(grid, density, 1e-3, alpha=0.15)
        # Logarithmic, because the narrowest densities are hundreds of times as high as the widest.
        most = 2 * max(density.max() for density in densities.values())
        axis.set(title=net, xlabel="SSIM to the clean image", yscale="log", ylim=(0.1, most))
        axis.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("density")
    _save(figure, path)


def reconstruction_bars(path: str, results: dict[str, dict[str, dict]]) -> None:
    """Draws the SSIM of reconstructed corruptions for each network (paper, figure 3).

    Args:
      path: PNG to write.
      results: dicts with 'mean' and 'std', by network and corruption.
    """
    from matplotlib.figure import Figure

    corruptions = list(next(iter(results.values())))
    figure = Figure(figsize=(1 + 0.6 * len(corruptions), 3.6), layout="constrained")
    axis = figure.subplots()
    _side_by_side(axis, results, corruptions)
    axis.set(ylabel="SSIM", ylim=(0, 1.05))
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(results))
    _save(figure, path)


def severity_curves(
    path: str, results: dict[str, dict[str, Sequence[float]]], *, order: Sequence[str]
) -> None:
    """Draws error against severity, one panel per corruption.

    Args:
      path: PNG to write.
      results: errors in percent at severities 1 to 5 (NaN if missing), by run and corruption.
      order: the corruptions in the order of the panels; those that no run has are left out. 'mce'
        is the mean over the standard 15.
    """
    from matplotlib.figure import Figure

    corruptions = [name for name in order if any(name in run for run in results.values())]
    lines = -(-len(corruptions) // 4)
    figure = Figure(figsize=(11, 0.7 + 2.1 * lines), layout="constrained")
    panels = figure.subplots(lines, 4, sharex=True, sharey=True, squeeze=False).ravel()
    colours = _colours(len(results))
    for axis, corruption in zip(panels, corruptions, strict=False):
        for (label, run), colour in zip(results.items(), colours, strict=True):
            # Runs without this corruption are drawn as NaN, for the legend.
            errors = run.get(corruption, [np.nan] * 5)
            axis.plot(range(1, 6), errors, marker=".", color=colour, label=_plain(label))
        axis.set_title("mean of the 15" if corruption == "mce" else _words(corruption), fontsize=9)
        axis.set_xticks(range(1, 6))
        axis.grid(alpha=0.3)
    for axis in panels[len(corruptions) :]:
        axis.remove()
    panels[0].set_ylim(0, None)
    figure.supxlabel("severity", fontsize=10)
    figure.supylabel("error, %", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = max(1, 120 // (8 + max(map(len, labels))))  # About 120 characters fit.
    figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=columns)
    _save(figure, path)


def training_maps(path: str, steps: Sequence[int], accuracies: dict[str, Sequence[float]]) -> None:
    """Draws heat maps of accuracy by corruption and step (paper, figure 2).

    The three panels show the accuracy, the accuracy scaled to [0,1] within each step, and the
    accuracy scaled to [0,1] within each corruption.

    Args:
      path: PNG to write.
      steps: [T].
      accuracies: percent [T] by corruption, from top to bottom; NaN if not measured.
    """
    from matplotlib.figure import Figure

    raw = np.array(list(accuracies.values()))
    figure = Figure(figsize=(12, 1.4 + 0.24 * len(raw)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    shown = (
        ("accuracy, %", raw),
        ("scaled within each step", _scaled(raw, 0)),
        ("scaled within each corruption", _scaled(raw, 1)),
    )
    for axis, (title, values) in zip(panels, shown, strict=True):
        image = axis.imshow(values, aspect="auto", interpolation="nearest", cmap="magma")
        ticks = np.unique(np.linspace(0, len(steps) - 1, min(5, len(steps))).astype(int))
        axis.set_xticks(ticks, [str(steps[i]) for i in ticks])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        figure.colorbar(image, ax=axis, aspect=40, fraction=0.05, pad=0.02)
    panels[0].set_yticks(range(len(raw)), [_words(name) for name in accuracies], fontsize=9)
    _save(figure, path)


def _scaled(values: np.ndarray, axis: int) -> np.ndarray:
    """Scales values to [0,1] along an axis; constant ones become 1."""
    low, high = (f(values, axis=axis, keepdims=True) for f in (np.fmin.reduce, np.fmax.reduce))
    flat = high == low
    return np.where(flat & np.isfinite(values), 1, (values - low) / np.where(flat, 1, high - low))


def _side_by_side(axis: Any, results: dict[str, dict[str, dict]], names: Sequence[str]) -> None:
    """Draws grouped bars: one group per name with one bar per result."""
    width = 0.8 / len(results)
    colours = _colours(len(results))
    for i, (label, entries) in enumerate(results.items()):
        places = np.arange(len(names)) + (i - (len(results) - 1) / 2) * width
        means, deviations = (
            [entries.get(name, {}).get(k, np.nan) for name in names] for k in ("mean", "std")
        )
        axis.bar(
            places,
            means,
            width,
            yerr=deviations,
            label=_plain(label),
            color=colours[i],
            error_kw={"lw": 0.8},
        )
    axis.set_xticks(range(len(names)), [_words(name) for name in names], rotation=40, ha="right")


def _colours(count: int) -> list[Any]:
    import matplotlib

    if count <= 10:
        return [f"C{i}" for i in range(count)]
    return list(matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, count)))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plain(name: str) -> str:
    """Escapes a name for matplotlib's mathematical notation."""
    name = name.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f"\u200b{name}" if name.startswith("_") else name  # Legends ignore names with '_'.


def _save(figure: Any, path: str) -> None:
    """Writes a PNG atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    paths.write(path, content.getvalue())
