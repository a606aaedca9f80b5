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
