"""Pictures."""

from collections.abc import Sequence

import numpy as np


def adversarial_rows(
    path: str,
    *,
    clean: np.ndarray,
    augmented: np.ndarray,
    similarity: np.ndarray,
    label: np.ndarray,
    clean_verdict: np.ndarray,
    augmented_verdict: np.ndarray,
    class_names: Sequence[str],
    columns: int = 10,
) -> None:
    """Draws pairs as the paper's figure 1a: clean, augmented and difference (x5) under each other.

    Args:
      path: PNG to write.
      clean: images [B,H,W,C] in [0,1]; the first `columns` are drawn.
      augmented: as clean.
      similarity: SSIM [B].
      label: true classes [B].
      clean_verdict: classes given to the clean images [B]; a wrong one is printed red.
      augmented_verdict: classes given to the augmented images [B].
      class_names: names of the classes.
      columns: pairs drawn at most.
    """
    from matplotlib.figure import Figure  # takes a second to import

    count = min(columns, len(clean))
    figure = Figure(figsize=(1.25 * count, 4.4), layout="constrained")
    axes = figure.subplots(3, count, squeeze=False)
    difference = np.clip(0.5 + 5 * (augmented - clean), 0, 1)
    for i in range(count):
        rows = (clean[i], augmented[i], difference[i])
        titles = (
            f"{class_names[clean_verdict[i]]}",
            f"{class_names[augmented_verdict[i]]}",
            f"SSIM {similarity[i]:.2f}",
        )
        wrong = (clean_verdict[i] != label[i], augmented_verdict[i] != label[i], False)
        for axis, image, title, red in zip(axes[:, i], rows, titles, wrong, strict=True):
            axis.imshow(np.clip(image, 0, 1), interpolation="nearest", vmin=0, vmax=1)
            axis.set_title(title, fontsize=9, color="crimson" if red else "black")
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, name in zip(axes[:, 0], ("clean", "AdA", "difference x5"), strict=True):
        axis.set_ylabel(name, fontsize=10)
    figure.savefig(path, dpi=120)


def ssim_densities(path: str, results: dict[str, dict[str, dict]]) -> None:
    """Draws the densities of SSIM at each radius, a panel for each network (paper, figure 1b).

    Args:
      path: PNG to write.
      results: by network and radius: 'values', a list of SSIMs.
    """
    import scipy.stats
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(results), 3.4), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for axis, (net, by_radius) in zip(panels, results.items(), strict=True):
        drawn = {nu: np.asarray(entry["values"]) for nu, entry in by_radius.items() if nu != "0"}
        low = max(0.0, min(np.quantile(values, 0.01) for values in drawn.values()) - 0.02)
        grid = np.linspace(low, 1, 400)
        for nu, values in drawn.items():
            density = scipy.stats.gaussian_kde(values)(grid)
            axis.plot(grid, density, label=f"$\\nu$ = {nu}")
            axis.fill_between(grid, density, alpha=0.15)
        axis.set(title=net, xlabel="SSIM to the clean image", yscale="log", ylim=(0.05, None))
        axis.legend(frameon=False)
    panels[0].set_ylabel("density")
    figure.savefig(path, dpi=120)


def reconstruction_bars(path: str, results: dict[str, dict[str, dict]]) -> None:
    """Draws SSIM of reconstructed corruptions, networks side by side (paper, figure 3).

    Args:
      path: PNG to write.
      results: by network and corruption: 'mean' and 'std'.
    """
    from matplotlib.figure import Figure

    corruptions = list(next(iter(results.values())))
    figure = Figure(figsize=(1 + 0.6 * len(corruptions), 3.6), layout="constrained")
    axis, width = figure.subplots(), 0.8 / len(results)
    for i, (net, by_corruption) in enumerate(results.items()):
        places = np.arange(len(corruptions)) + (i - (len(results) - 1) / 2) * width
        means, deviations = (
            [by_corruption.get(c, {}).get(k, np.nan) for c in corruptions] for k in ("mean", "std")
        )
        axis.bar(places, means, width, yerr=deviations, label=net, error_kw={"lw": 0.8})
    labels = [name.replace("_", " ") for name in corruptions]
    axis.set_xticks(range(len(corruptions)), labels, rotation=40, ha="right")
    axis.set(ylabel="SSIM", ylim=(0, 1.05))
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
