"""Checks of arrays of images and labels."""

import numpy as np

from ada_jax.errors import UserError

_ROUNDING = 1e-6  # As `checks.as_images` allows.
_MOST_CLASSES = 100_000  # Larger labels of a set that may lack classes are a mistake.
_FEW = 4  # Sets of at most this many images may be black.


def checked_images(images: np.ndarray, where: str) -> np.ndarray:
    """Checks images and converts them to [N, H, W, 3], uint8 or float32; `where` names them."""
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=-1)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        advice = ""
        if images.ndim == 4 and images.shape[1] in (1, 3):
            advice = " (images.transpose(0, 2, 3, 1) moves the channels to the last axis)"
        elif images.ndim == 4 and images.shape[-1] == 4:
            advice = " (images[..., :3] removes the fourth channel)"
        raise UserError(
            f"{where} has images of shape {list(images.shape)}: make them [N, H, W, 3], or "
            f"[N, H, W] for grey, and not empty{advice}."
        )
    if images.dtype == bool:
        raise UserError(
            f"{where} has images of type bool: convert them to uint8, such as "
            "255 * images.astype('uint8')."
        )
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise UserError(
            f"{where} has images of type {images.dtype}: convert them to uint8 in 0..255 or "
            "floating point in [0, 1], such as images.astype('uint8') if they are in 0..255."
        )
    if images.dtype != np.uint8:
        low, high = images.min(), images.max()
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # Also true of NaN.
            raise UserError(
                f"{where} has floating-point pixels from {low} to {high}: scale them to [0, 1], "
                "without NaN."
            )
        images = np.clip(images, 0, 1, dtype=np.float32)
    check_brightness(images, where)
    return images


def check_brightness(images: np.ndarray, where: str) -> None:
    """Raises UserError for images that are black because they were scaled to [0, 1] twice."""
    if len(images) <= _FEW:
        return
    if images.dtype == np.uint8 and images.max() <= 1:
        raise UserError(
            f"{where} has uint8 images without a pixel above 1, which are black: multiply images "
            "in [0, 1] by 255 before casting them to uint8."
        )
    if images.dtype != np.uint8 and images.max() <= 1 / 255 + 1e-6:
        raise UserError(
            f"{where} has floating-point images without a pixel above 1/255, which are black: "
            "divide pixels by 255 only once."
        )


def checked_labels(labels: np.ndarray, where: str) -> np.ndarray:
    """Checks labels and converts them to [N] int32; `where` names them."""
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    floating = labels.ndim == 1 and np.issubdtype(labels.dtype, np.floating)
    if floating and np.array_equal(labels, np.rint(labels)):
        # Integers or infinity; float16 cannot represent the limits.
        labels = np.clip(labels.astype(np.float64), -(2**31), 2**31).astype(np.int64)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        advice = ""
        if labels.ndim == 2:
            advice = " (labels.argmax(1) if they are one-hot)"
        elif labels.dtype.kind in "US":
            advice = " (numpy.unique(labels, return_inverse=True)[1] if they are names)"
        raise UserError(
            f"{where} has labels of shape {list(labels.shape)} and type {labels.dtype}: make them "
            f"[N] integers{advice}."
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < 2**31:
        raise UserError(
            f"{where} has labels from {labels.min()} to {labels.max()}: number the classes from 0."
        )
    return labels.astype(np.int32)


def class_numbers(labels: np.ndarray, where: str, *, trained: bool = True) -> tuple[str, ...]:
    """The class names '0', '1', ... up to the largest label; of training sets, all must occur."""
    present = np.unique(labels)
    if not trained and len(present) and present[-1] < _MOST_CLASSES:
        return tuple(map(str, range(max(2, int(present[-1]) + 1))))
    if len(present) < 2 or present[-1] != len(present) - 1:
        first = int(present[0]) if len(present) else 0
        found = ", ".join(repr(str(label)) for label in present[:10])
        shifted = first and present[-1] - first == len(present) - 1
        raise UserError(
            f"{where} has labels of {len(present)} class(es), {found}"
            f"{' ...' if len(present) > 10 else ''}: there must be at least two, numbered 0, 1, 2, "
            f"... without a gap{f'; subtract {first}' if shifted else ''}."
        )
    return tuple(str(label) for label in present)
