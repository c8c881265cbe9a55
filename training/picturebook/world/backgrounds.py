"""Painted backgrounds. A painter takes a random generator and returns an image and the row where the ground begins."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

SIZE = 128
"""Side of a scene in pixels."""
N_VARIANTS = 128
"""Paintings of each background."""

Pixels = npt.NDArray[np.float32]
Colour = tuple[float, float, float]


class Background(NamedTuple):
    """A painted background."""

    image: Pixels
    """[SIZE, SIZE, 3] in 0..1."""
    horizon: int
    """Row where the ground (or the water) begins."""


@cache
def background(background: str, variant: int) -> Background:
    """The variant-th painting of a background, 0 <= variant < N_VARIANTS."""
    rng = np.random.default_rng([sorted(_PAINTERS).index(background), variant])
    image, horizon = _PAINTERS[background](rng)
    image = (image * rng.uniform(0.93, 1.05)).clip(0, 1).astype(np.float32)
    if rng.random() < 0.5:
        image = np.ascontiguousarray(image[:, ::-1])
    image.flags.writeable = False
    return Background(image, horizon)


def _noise(rng: np.random.Generator, rows: int, columns: int) -> Pixels:
    """Smooth noise in -1..1, [SIZE, SIZE], from a grid of `rows` x `columns` random values."""
    grid = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32)


def _gradient(top: Colour, bottom: Colour, start: int = 0, end: int = SIZE) -> Pixels:
    """Colour running from `top` at row `start` to `bottom` at row `end`, [SIZE, SIZE, 3]."""
    t = np.clip((np.arange(SIZE, dtype=np.float32) - start) / max(end - start, 1), 0, 1)[:, None, None]
    column = (1 - t) * np.array(top, dtype=np.float32) + t * np.array(bottom, dtype=np.float32)
    return np.broadcast_to(column, (SIZE, SIZE, 3)).astype(np.float32)


def _below(rng: np.random.Generator, row: float, swing: float, waves: int) -> Pixels:
    """Mask of what lies under a hilly line round `row`, [SIZE, SIZE, 1] in 0..1 with a soft rim of one pixel."""
    line = row + swing * _noise(rng, 1, waves)[0]
    mask: Pixels = np.clip(np.arange(SIZE, dtype=np.float32)[:, None] - line[None] + 0.5, 0, 1)[..., None]
    return mask.astype(np.float32)


def _over(base: Pixels, paint: Pixels | Colour, mask: Pixels) -> Pixels:
    blended: Pixels = base + mask * (np.asarray(paint, dtype=np.float32) - base)
    return blended


def _sky(rng: np.random.Generator, top: Colour, bottom: Colour, horizon: int, clouds: float = 0.35) -> Pixels:
    sky = _gradient(top, bottom, 0, horizon)
    cloud = np.clip(_noise(rng, 9, 5) - 0.25, 0, 1)[..., None] * clouds
    return _over(sky, (1.0, 1.0, 1.0), cloud.astype(np.float32))


def _grass(rng: np.random.Generator) -> tuple[Pixels, int]:
    horizon = int(rng.integers(52, 76))
    image = _sky(rng, (0.45, 0.74, 0.96), (0.82, 0.93, 0.99), horizon)
    far = _below(rng, horizon - 8, 7, 5)
    image = _over(image, (0.50, 0.74, 0.42), far)
    meadow = _gradient((0.44, 0.75, 0.28), (0.24, 0.55, 0.16), horizon, SIZE)
    meadow += 0.05 * _noise(rng, 20, 12)[..., None]
    return _over(image, meadow, _below(rng, horizon, 5, 4)), horizon


def _forest(rng: np.random.Generator) -> tuple[Pixels, int]:
    horizon = int(rng.integers(72, 88))
    image = _gradient((0.16, 0.36, 0.26), (0.30, 0.50, 0.30), 0, horizon)
    image += 0.07 * _noise(rng, 10, 14)[..., None]
    for _ in range(int(rng.integers(5, 9))):
        centre, width = rng.uniform(0, SIZE), rng.uniform(3, 7)
        lean = rng.uniform(-4, 4)
        x = np.arange(SIZE, dtype=np.float32)[None] - centre - lean * np.arange(SIZE, dtype=np.float32)[:, None] / SIZE
        trunk = np.clip(width / 2 - np.abs(x) + 0.5, 0, 1)[..., None].astype(np.float32)
        shade = rng.uniform(0.75, 1.1)
        image = _over(image, (0.30 * shade, 0.21 * shade, 0.13 * shade), trunk)
    floor = _gradient((0.30, 0.36, 0.15), (0.20, 0.23, 0.10), horizon, SIZE) + 0.05 * _noise(rng, 16, 16)[..., None]
    return _over(image, floor, _below(rng, horizon, 4, 6)), horizon


def _beach(rng: np.random.Generator) -> tuple[Pixels, int]:
    shore = int(rng.integers(56, 72))
    image = _sky(rng, (0.40, 0.76, 0.95), (0.88, 0.96, 0.98), shore)
    water = _gradient((0.10, 0.60, 0.75), (0.35, 0.83, 0.84), shore - 18, shore)
    image = _over(image, water, _below(rng, shore - 18, 0.5, 2))
    image = _over(image, (0.97, 0.99, 1.0), _below(rng, shore - 1, 2, 6))
    sand = _gradient((0.96, 0.87, 0.65), (0.90, 0.76, 0.50), shore, SIZE) + 0.035 * _noise(rng, 26, 18)[..., None]
    return _over(image, sand, _below(rng, shore + 2, 2, 6)), shore


def _sea(rng: np.random.Generator) -> tuple[Pixels, int]:
    horizon = int(rng.integers(36, 56))
    image = _sky(rng, (0.58, 0.80, 0.96), (0.90, 0.95, 0.98), horizon, 0.5)
    water = _gradient((0.16, 0.52, 0.78), (0.04, 0.22, 0.50), horizon, SIZE)
    rows = np.arange(SIZE, dtype=np.float32)[:, None]
    phase = 6 * _noise(rng, 4, 6) + rng.uniform(0, 6)
    ripple = np.sin(np.clip(rows - horizon, 0, None) ** 0.8 * 0.9 + phase)
    water = water + 0.05 * ripple[..., None].astype(np.float32)
    return _over(image, water, _below(rng, horizon, 1.0, 3)), horizon


def _snow(rng: np.random.Generator) -> tuple[Pixels, int]:
    horizon = int(rng.integers(56, 76))
    image = _gradient((0.62, 0.70, 0.82), (0.84, 0.88, 0.94), 0, horizon)
    image = _over(image, (0.74, 0.80, 0.90), _below(rng, horizon - 14, 12, 6))
    ground = _gradient((0.97, 0.98, 1.0), (0.86, 0.91, 0.98), horizon, SIZE) + 0.03 * _noise(rng, 8, 8)[..., None]
    image = _over(image, ground, _below(rng, horizon, 5, 4))
    flakes = np.zeros((SIZE, SIZE), dtype=np.float32)
    y, x = rng.integers(1, SIZE - 2, (2, 40))
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        flakes[y + dy, x + dx] = 0.9
    return _over(image, (1.0, 1.0, 1.0), flakes[..., None]), horizon


def _desert(rng: np.random.Generator) -> tuple[Pixels, int]:
    horizon = int(rng.integers(52, 76))
    image = _gradient((0.98, 0.72, 0.42), (0.99, 0.90, 0.68), 0, horizon)
    image = _over(image, (0.80, 0.47, 0.28), _below(rng, horizon - 9, 9, 4))
    near = _gradient((0.91, 0.62, 0.32), (0.78, 0.44, 0.20), horizon, SIZE)
    image = _over(image, near, _below(rng, horizon, 5, 3))
    return _over(image, (0.86, 0.53, 0.26), 0.7 * _below(rng, horizon + 26, 9, 3)), horizon


def _street(rng: np.random.Generator) -> tuple[Pixels, int]:
    horizon = int(rng.integers(72, 84))
    image = _gradient((0.72, 0.80, 0.88), (0.88, 0.90, 0.92), 0, horizon)
    x = -int(rng.integers(0, 10))
    while x < SIZE:
        width, top = int(rng.integers(18, 32)), int(rng.integers(14, 48))
        wall = np.array(_WALLS[int(rng.integers(len(_WALLS)))]) * rng.uniform(0.92, 1.05)
        image[top:horizon, max(x, 0) : max(x + width - 1, 0)] = wall
        for row in range(top + 5, horizon - 6, 11):
            for column in range(x + 4, x + width - 6, 8):
                if column >= 0:
                    image[row : row + 6, column : column + 4] = (0.95, 0.90, 0.66) if rng.random() < 0.4 else wall * 0.6
        x += width
    road = _gradient((0.44, 0.44, 0.47), (0.33, 0.33, 0.36), horizon, SIZE) + 0.02 * _noise(rng, 20, 20)[..., None]
    image[horizon:] = road[horizon:]
    image[horizon : horizon + 5] = (0.72, 0.71, 0.69)
    middle = (horizon + SIZE) // 2 + 3
    for start in range(int(rng.integers(-20, 0)), SIZE, 28):
        image[middle : middle + 4, max(start, 0) : max(start + 15, 0)] = (0.93, 0.91, 0.82)
    return image, horizon


_WALLS: tuple[Colour, ...] = ((0.62, 0.42, 0.36), (0.55, 0.56, 0.60), (0.70, 0.62, 0.52), (0.48, 0.52, 0.58))


def _kitchen(rng: np.random.Generator) -> tuple[Pixels, int]:
    horizon = int(rng.integers(68, 84))
    tint = _TILES[int(rng.integers(len(_TILES)))]
    image = _gradient(tint, tint, 0, horizon)
    offset, pitch = int(rng.integers(0, 16)), 16
    image[offset % pitch : horizon : pitch] *= 0.88
    image[:horizon, (offset * 5) % pitch :: pitch] *= 0.88
    wood = _gradient((0.72, 0.50, 0.31), (0.58, 0.37, 0.21), horizon, SIZE) + 0.06 * _noise(rng, 32, 3)[..., None]
    image[horizon:] = wood[horizon:]
    image[horizon : horizon + 4] = (0.45, 0.29, 0.17)
    return image, horizon


_TILES: tuple[Colour, ...] = ((0.93, 0.91, 0.84), (0.84, 0.92, 0.90), (0.95, 0.87, 0.84), (0.88, 0.90, 0.95))

_PAINTERS: dict[str, Callable[[np.random.Generator], tuple[Pixels, int]]] = {
    "grass": _grass,
    "forest": _forest,
    "beach": _beach,
    "sea": _sea,
    "snow": _snow,
    "desert": _desert,
    "street": _street,
    "kitchen": _kitchen,
}
