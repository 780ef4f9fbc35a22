"""Where the nearest thing of each kind is, in view or remembered, in numbers. For any env with a view on a grid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

NUM_FEATURES = 18  # per kind
IN_VIEW, REMEMBERED = 2, 1  # how a place is known; 0: it is not
FAR = 63  # steps; a place that is farther away is remembered as being this far


@functools.cache
def _cells(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks the cells of a view by nearness, the player in the middle.

    Returns:
        rank (R * C,) uint8 from 1, the player's own cell last; offsets (R * C + 1, 2) int32 dy, dx by rank
    """
    dy, dx = np.meshgrid(np.arange(rows) - rows // 2, np.arange(cols) - cols // 2, indexing="ij")
    offsets = np.stack([dy.ravel(), dx.ravel()], -1)
    distance, reach = abs(offsets).sum(1), abs(offsets).max(1)
    order = np.lexsort((np.arange(rows * cols), reach, np.where(distance, distance, rows * cols)))
    rank = np.argsort(order).astype(np.uint8) + np.uint8(1)
    return rank, np.concatenate([[[0, 0]], offsets[order]]).astype(np.int32)


def find_places(seen: jax.Array, facing: jax.Array) -> jax.Array:
    """Finds the nearest thing of each kind in view: what the player faces, else the fewest steps away.

    Args:
        seen: (..., W, R, C) bool, which cells of the view hold a thing of each of W kinds; the player is in the middle
        facing: (..., 2) int32, dy and dx of the cell that the player faces, south and east positive
    Returns:
        (..., W, 3) int32: dy, dx, IN_VIEW or 0. The cell that the player stands on does not count.
    """
    rows, cols = seen.shape[-2:]
    rank, offsets = _cells(rows, cols)
    front = (facing[..., 0] + rows // 2) * cols + facing[..., 1] + cols // 2
    rank = jnp.where(jnp.arange(rows * cols) == front[..., None], np.uint8(0), rank)  # (..., R * C)
    first = jnp.where(seen.reshape(*seen.shape[:-2], -1), rank[..., None, :], np.uint8(255)).min(-1)  # (..., W)
    found = first < rows * cols  # the player's own cell is the last one
    place = jnp.where((first == 0)[..., None], facing[..., None, :], jnp.asarray(offsets)[jnp.where(found, first, 0)])
    return jnp.concatenate([place * found[..., None], found[..., None] * IN_VIEW], -1).astype(jnp.int32)


def remember_places(
    old: jax.Array, moved: jax.Array, new: jax.Array, lasting: np.ndarray, view: tuple[int, int]
) -> jax.Array:
    """Keeps in mind where things were seen that are out of view now.

    Args:
        old: (..., W, 3) places as known before a step
        moved: (..., 2) int32, by how much the step moved the player
        new: (..., W, 3) places in view now
        lasting: (W,) bool, kinds that stay where they were seen
        view: R, C
    """
    offsets = jnp.clip(old[..., :2] - moved[..., None, :], -FAR, FAR)
    gone = (jnp.abs(offsets) <= np.array(view) // 2).all(-1)  # it would be in view
    kept = (old[..., 2] > 0) & ~gone & lasting
    remembered = jnp.concatenate([offsets, jnp.full_like(old[..., 2:], REMEMBERED)], -1) * kept[..., None]
    return jnp.where(new[..., 2:] > 0, new, remembered)


def nearest(places: jax.Array, facing: jax.Array, view: tuple[int, int]) -> jax.Array:
    """Says of each kind where it is, in numbers that one layer can act on.

    Args:
        places: (..., W, 3) int32 of `find_places` or `remember_places`
        facing: (..., 2) int32
        view: R, C
    Returns:
        (..., W, 18) f32, zeros for a kind that is not known: right, left, below, above, same column, same row, within
        1, 2, 3 steps, in reach (the eight neighbours), farther across than along, known, in view, in front, how far
        across and along as a share of the view, and of a long way
    """
    dy, dx, sight = places[..., 0], places[..., 1], places[..., 2]
    far_y, far_x = jnp.abs(dy), jnp.abs(dx)
    distance, reach = far_y + far_x, jnp.maximum(far_y, far_x)
    front = (places[..., :2] == facing[..., None, :]).all(-1) & (sight == IN_VIEW)
    numbers = [
        dx > 0, dx < 0, dy > 0, dy < 0, dx == 0, dy == 0, distance <= 1, distance <= 2, distance <= 3, reach <= 1,
        far_x > far_y, sight > 0, sight == IN_VIEW, front, jnp.minimum(far_x / (view[1] // 2), 1),
        jnp.minimum(far_y / (view[0] // 2), 1), far_x / FAR, far_y / FAR,
    ]  # fmt: skip
    numbers = jnp.stack([number.astype(jnp.float32) for number in numbers], -1)
    return numbers * (sight > 0)[..., None]


def pointed(near: jax.Array, kinds: jax.Array) -> jax.Array:
    """Picks the numbers of the kinds (..., 2) that are pointed at out of near (..., W, 18); W stands for nothing."""
    padded = jnp.concatenate([near, jnp.zeros_like(near[..., :1, :])], -2)
    picked = jnp.take_along_axis(padded, kinds[..., None].astype(jnp.int32), -2)  # (..., 2, 18)
    return picked.reshape(*picked.shape[:-2], -1)
