"""The colours that mean something: a scale for bits, one for bits with a sign, three stages, one for each label.

All are the same in light and dark, so that a saved picture reads like the page it came from.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from core.arrays import Floats

STAGES = ("early", "middle", "late")
STAGE_COLOURS = {"early": "#4a7bd0", "middle": "#1f9e86", "late": "#d08a1d"}

# The scale is a curve in OKLab from ink through rose to lamplight. Lightness only rises along it, so that it reads
# in grey and with any colour blindness; steps of equal length along it look equally large.
_INK = (0.20, 0.020, -0.090)
_ROSE = (0.62, 0.190, -0.010)
_LIGHT = (0.95, -0.015, 0.110)
_N = 256
# With a sign: from the same dark at zero through orange for more, through blue for less, equally light at equal size.
# Orange and blue stay apart in red-green blind eyes.
_ZERO = (0.20, 0.000, -0.020)
_MORE = ((0.60, 0.110, 0.130), (0.93, 0.000, 0.100))
_LESS = ((0.56, -0.030, -0.210), (0.93, -0.050, -0.040))

# The two matrices of OKLab in Ottosson's definition (2020).
_TO_LMS = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
)
_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)

# Lightnesses that stand out from paper and from ink, chromas and hues from which the labels' colours are chosen.
_LABEL_LIGHTNESS = (0.44, 0.52, 0.60, 0.68, 0.76, 0.84)
_LABEL_CHROMA = (0.03, 0.09, 0.13, 0.17, 0.21)
_GREYISH = 0.05
_LABEL_HUES = 72
# Linear sRGB as those see it who lack long-wave or medium-wave cones: Machado et al. 2009, severity 1.
_VISIONS = np.array(
    [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ]
)
# Common eyes have more room: what they tell apart has to be twice as far.
_WEIGHTS = np.array([[0.5], [1.0], [1.0]])


def _oklab_to_srgb(lab: Floats) -> Floats:
    """sRGB in 0..1 of OKLab colours [..., 3]."""
    linear = np.clip((lab @ _TO_LMS.T) ** 3 @ _TO_RGB.T, 0, 1)
    return np.asarray(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))


def scale_in_oklab() -> Floats:
    """The scale as OKLab colours [256, 3], equally far from each other."""
    return _bent(_N, _INK, _ROSE, _LIGHT)


def signed_scale_in_oklab() -> Floats:
    """The scale of values with a sign as OKLab colours [255, 3], from -1 to 1 with 0 in the middle."""
    half = _N // 2
    return np.concatenate([_bent(half, _ZERO, *_LESS)[:0:-1], _bent(half, _ZERO, *_MORE)])


def _bent(n: int, *points: tuple[float, float, float]) -> Floats:
    """[n, 3] colours from the first of three points to the last, bent towards the second, in equal steps."""
    start, middle, end = (np.array(point) for point in points)
    t = np.linspace(0, 1, 4001)[:, None]
    curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    wanted = np.linspace(0, length[-1], n)
    return np.stack([np.interp(wanted, length, curve[:, axis]) for axis in range(3)], axis=1)


SCALE: Floats = _oklab_to_srgb(scale_in_oklab())
"""sRGB of the scale in 0..1, [256, 3]."""
SIGNED: Floats = _oklab_to_srgb(signed_scale_in_oklab())
"""The same of the scale of values with a sign, [255, 3]."""


def scale_rgb(share: NDArray[np.floating]) -> Floats:
    """Colours [..., 3] in 0..1 of shares of the largest value, 0..1."""
    index = np.clip(np.nan_to_num(np.asarray(share)) * (_N - 1), 0, _N - 1)
    return np.asarray(SCALE[np.rint(index).astype(int)])


def signed_rgb(share: NDArray[np.floating]) -> Floats:
    """Colours [..., 3] in 0..1 of shares of the largest value, -1..1."""
    index = np.clip((np.nan_to_num(np.asarray(share)) + 1) / 2, 0, 1) * (len(SIGNED) - 1)
    return np.asarray(SIGNED[np.rint(index).astype(int)])


def scale_hex(share: float) -> str:
    """One colour of the scale as `#rrggbb`."""
    return _hex(scale_rgb(np.array(share)))


def _hex(rgb: Floats) -> str:
    return "#" + "".join(f"{round(float(part) * 255):02x}" for part in rgb)


def ink_on(share: float) -> str:
    """The text colour, dark or light, that stands out more on that colour of the scale."""
    rgb = scale_rgb(np.array(share))
    luminance = float(_linear(rgb) @ np.array([0.2126, 0.7152, 0.0722]))
    return "#08050c" if (luminance + 0.05) / 0.0517 > 1.05 / (luminance + 0.05) else "#ffffff"


def scale_gradient() -> str:
    """The scale as a CSS gradient, left to right."""
    return "linear-gradient(90deg, " + ", ".join(scale_hex(i / 12) for i in range(13)) + ")"


def signed_gradient() -> str:
    """The scale of values with a sign as a CSS gradient, less on the left, more on the right."""
    return "linear-gradient(90deg, " + ", ".join(_hex(rgb) for rgb in signed_rgb(np.linspace(-1, 1, 17))) + ")"


@lru_cache(maxsize=4)
def label_colours(quiet: tuple[bool, ...]) -> tuple[str, ...]:
    """A colour as `#rrggbb` for each label, a greyish one where it is to be quiet, as what lies behind things is.

    Each is the one farthest from all before it, where the distance is the least among common and red-green blind eyes.
    """
    lightness, chroma, hue = np.meshgrid(
        _LABEL_LIGHTNESS, _LABEL_CHROMA, np.linspace(0, 2 * np.pi, _LABEL_HUES, endpoint=False), indexing="ij"
    )
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1).reshape(-1, 3)
    rgb = _oklab_to_srgb(lab)
    shown = np.linalg.norm(_linear_to_oklab(_linear(rgb)) - lab, axis=1) < 0.005  # others a screen cannot show
    rgb = rgb[shown]
    linear = _linear(rgb)
    seen = np.stack([_linear_to_oklab(np.clip(linear @ vision.T, 0, 1)) for vision in _VISIONS])
    greyish = np.linalg.norm(lab[shown, 1:], axis=1) < _GREYISH
    nearest = np.abs(seen[0, :, 2])  # to begin with, what is yellowest or bluest: those see it whose red is green
    colours: list[str] = []
    for wanted in quiet:
        best = int(np.argmax(np.where(greyish == wanted, nearest, -1)))
        nearest = np.minimum(
            nearest if colours else np.inf, (_WEIGHTS * np.linalg.norm(seen - seen[:, [best]], axis=2)).min(0)
        )
        colours.append(_hex(rgb[best]))
    return tuple(colours)


def _linear(rgb: Floats) -> Floats:
    """Linear sRGB of sRGB colours."""
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _linear_to_oklab(linear: Floats) -> Floats:
    return np.asarray(np.cbrt(linear @ np.linalg.inv(_TO_RGB).T) @ np.linalg.inv(_TO_LMS).T)
