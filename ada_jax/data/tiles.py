"""Square tiles of photographs, which corruption networks are pre-trained and measured on."""

import numpy as np

from ada_jax.errors import UserError

PHOTOS = {  # scikit-image's colour photographs that its package contains
    "train": ("astronaut", "coffee", "rocket", "stereo_motorcycle"),
    "test": ("chelsea",),
}


def cut(image: np.ndarray, *, side: int, step: int, most: int) -> np.ndarray:
    """Cuts a photograph into squares that cover it.

    Args:
      image: [H,W,3] uint8.
      side: side of the squares in pixels.
      step: pixels from one square to the next; the last of a row lies at the photograph's edge.
      most: maximum number of squares; of more, evenly spaced ones are kept.

    Returns:
      [N,side,side,3] uint8.

    Raises:
      UserError: the photograph is smaller than a square.
    """
    height, width = image.shape[:2]
    if side > min(height, width):
        raise UserError(
            f"config.patch or config.sr_patch needs squares of {side} pixels, more than a "
            f"photograph of {height}x{width} has: decrease it."
        )
    tops, lefts = ([*range(0, n - side, step), n - side] for n in (height, width))
    corners = [(i, j) for i in tops for j in lefts]
    if len(corners) > most:
        corners = [corners[k] for k in np.linspace(0, len(corners) - 1, most).astype(int)]
    return np.stack([image[i : i + side, j : j + side] for i, j in corners])


def photo(name: str) -> np.ndarray:
    """A photograph of scikit-image, [H,W,3] uint8; the left one of a stereo pair."""
    import skimage.data

    image = getattr(skimage.data, name)()
    return image[0] if isinstance(image, tuple) else image
