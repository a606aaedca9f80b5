"""Positions of labels in a scatter plot. Boxes are (left, top, right, bottom) in pixels."""

import numpy as np

_ANGLES = np.arange(0, 2 * np.pi, np.pi / 8)
_DISTANCES = (7.0, 14.0, 24.0, 36.0, 50.0, 66.0, 84.0, 104.0, 130.0, 160.0)  # Point to label.
_GAP = 10  # Between labels beside each other.
_RESTARTS = 16
# Costs of conflicts, in pixels of distance. A label is ambiguous beside another point.
_OVERLAP, _CROSSING, _AMBIGUOUS = 100.0, 40.0, 30.0


def place(
    points: np.ndarray,
    sizes: np.ndarray,
    obstacles: np.ndarray,
    bounds: tuple[float, float, float, float],
) -> np.ndarray:
    """Places a label near each point, away from other labels, leaders and obstacles.

    Each label has candidates around its point. The labels in turn take the one of lowest cost,
    given the others', until none changes. The best of several orders is returned.

    Args:
      points: [N,2].
      sizes: widths and heights of the labels [N,2].
      obstacles: boxes [M,4] that labels should not cover, such as the points' marks.
      bounds: box that the labels stay in, if they fit.

    Returns:
      Boxes of the labels [N,4].
    """
    candidates = np.stack([_around(*pair) for pair in zip(points, sizes, strict=True)])  # [N,C,4]
    leaders = np.stack([_leader(p, boxes) for p, boxes in zip(points, candidates, strict=True)])
    distances = np.tile(np.repeat(_DISTANCES, len(_ANGLES)), (len(points), 1))
    outside = np.maximum(0, bounds[:2] - candidates[..., :2]).sum(-1)
    outside += np.maximum(0, candidates[..., 2:] - bounds[2:]).sum(-1)
    alone = distances + distances**2 / 60 + 10 * _OVERLAP * outside
    alone += _OVERLAP * _overlap(candidates, obstacles).sum(-1)
    alone += _AMBIGUOUS * _ambiguous(points, candidates)
    alone += _CROSSING * _inside(leaders[:, :, None], obstacles).sum(-1)
    best, lowest = None, np.inf
    for seed in range(_RESTARTS):
        random = np.random.default_rng(seed)
        start = alone.argsort(1)[np.arange(len(points)), random.integers(40, size=len(points))]
        order = random.permutation(len(points))
        chosen, cost = _descend(start, order, alone, candidates, leaders)
        if cost < lowest:
            best, lowest = chosen, cost
    return candidates[np.arange(len(points)), best]


def _descend(
    start: np.ndarray,
    order: np.ndarray,
    alone: np.ndarray,
    candidates: np.ndarray,
    leaders: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Improves one label after the other; returns the candidates' indices and the total cost."""
    chosen = start.copy()
    everyone = np.arange(len(order))
    for _ in range(20):
        before, total = chosen.copy(), 0.0
        for i in order:
            others = everyone[everyone != i]
            boxes, lines = candidates[others, chosen[others]], leaders[others, chosen[others]]
            costs = alone[i] + _conflicts(candidates[i], leaders[i], boxes, lines)
            chosen[i] = costs.argmin()
            total += costs[chosen[i]]
        if (chosen == before).all():
            break
    return chosen, total


def _around(point: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Boxes [C,4] around a point, by distance and angle, the nearest to the right first."""
    towards = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], -1)
    # The box's point that is nearest: its corners and the middles of its sides.
    nearest = np.round(towards * 1.2).clip(-1, 1)
    centres = [point + d * towards + nearest * size / 2 for d in _DISTANCES]
    centres = np.concatenate(centres)
    return np.concatenate([centres - size / 2, centres + size / 2], -1)


def _ambiguous(points: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Numbers [N,C] of other points as near to a box [N,C,4] as its own."""
    boxes = candidates[:, :, None]
    away = np.hypot(*np.moveaxis(np.clip(points, boxes[..., :2], boxes[..., 2:]) - points, -1, 0))
    own = np.diagonal(away, axis1=0, axis2=2).T[:, :, None]
    return (away < own + 4).sum(-1) - 1


def _leader(point: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Ends [C,2,2] of the lines from a point to the nearest points of boxes [C,4]."""
    ends = np.clip(point, boxes[:, :2], boxes[:, 2:])
    return np.stack([np.broadcast_to(point, ends.shape), ends], 1)


def _conflicts(
    boxes: np.ndarray, leaders: np.ndarray, others: np.ndarray, other_leaders: np.ndarray
) -> np.ndarray:
    """Costs [C] of boxes [C,4] and leaders [C,2,2] beside those of other labels."""
    overlaps = _overlap(boxes, others + (-_GAP, 0, _GAP, 0)).sum(-1)
    crossed = _inside(leaders[:, None], others[None]).sum(-1)
    crossed += _inside(other_leaders[None], boxes[:, None]).sum(-1)
    crossed += _crosses(leaders[:, None], other_leaders[None]).sum(-1)
    return _OVERLAP * overlaps + _CROSSING * crossed


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Overlaps [...,M] of boxes [...,4] with others [M,4]: the smaller side in pixels, plus 1."""
    low = np.maximum(boxes[..., None, :2], others[:, :2])
    high = np.minimum(boxes[..., None, 2:], others[:, 2:])
    sides = high - low
    side = np.minimum(sides[..., 0], sides[..., 1])
    return np.where(side > 0, 1 + side, 0)


def _inside(lines: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether straight lines [...,2,2] pass through boxes [...,4]."""
    start = lines[..., 0, :]
    along = lines[..., 1, :] - start
    along = np.where(np.abs(along) < 1e-6, 1e-6, along)
    # The shares of the line at which it passes the sides.
    shares = (boxes[..., :2] - start) / along, (boxes[..., 2:] - start) / along
    enters, leaves = np.minimum(*shares), np.maximum(*shares)
    enters = np.maximum(enters[..., 0], enters[..., 1])
    leaves = np.minimum(leaves[..., 0], leaves[..., 1])
    return np.maximum(enters, 0) < np.minimum(leaves, 1)


def _crosses(lines: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether straight lines [...,2,2] cross others."""
    a, b, c, d = lines[..., 0, :], lines[..., 1, :], others[..., 0, :], others[..., 1, :]

    def side(start: np.ndarray, end: np.ndarray, point: np.ndarray) -> np.ndarray:
        first, second = end - start, point - start
        return np.sign(first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0])

    return (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)
