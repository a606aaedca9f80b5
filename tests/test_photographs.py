"""The rectangles that photographs are cropped to."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ada_jax.data import photographs


@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 600),
    height=st.integers(1, 600),
    least=st.floats(0.01, 1),
)
def test_random_boxes_lie_inside_and_keep_their_shape(seed, width, height, least):
    generator = np.random.RandomState(seed)
    box = photographs.random_box(generator, width, height, scale=(least, 1), ratio=(3 / 4, 4 / 3))
    left, top, right, bottom = box
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    # Sides are rounded by half a pixel each.
    assert w - 0.5 <= 4 / 3 * (h + 0.5) + 0.5 and h - 0.5 <= 4 / 3 * (w + 0.5) + 0.5


def test_random_boxes_are_spread_as_said():
    generator = np.random.RandomState(0)
    settings = {"scale": (0.08, 0.4), "ratio": (0.75, 4 / 3)}
    boxes = np.array(
        [photographs.random_box(generator, 1000, 1000, **settings) for _ in range(4000)]
    )
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    for values, low, high in ((w * h / 1e6, 0.08, 0.4), (np.log(w / h), -0.2877, 0.2877)):
        spread = [np.mean(values), np.std(values)]
        np.testing.assert_allclose(spread, [(low + high) / 2, (high - low) / 12**0.5], atol=0.01)
    share = boxes[:, 0] / (1000 - w)
    np.testing.assert_allclose([share.mean(), share.std()], [0.5, 12**-0.5], atol=0.02)


def test_a_panorama_is_cropped_in_its_centre():
    generator = np.random.RandomState(0)
    box = photographs.random_box(generator, 900, 90, scale=(0.9, 1), ratio=(0.75, 4 / 3))
    assert box == (390, 0, 510, 90)
