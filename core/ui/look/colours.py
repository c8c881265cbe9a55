"""Colours with a meaning: a scale for bits, one for signed bits, three stages, one colour per label.

All are the same in light and dark mode, so that a downloaded image reads like the page it came from.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from core.arrays import Floats

STAGES = ("early", "middle", "late")
STAGE_COLOURS = {"early": "#4a7bd0", "middle": "#1f9e86", "late": "#d08a1d"}

# The scale is a curve in OKLab from ink through rose to a warm white. Lightness only rises along it, so that it can be
# read in grey and with any colour blindness; steps of equal length along it look equally large.
_INK = (0.20, 0.020, -0.090)
_ROSE = (0.62, 0.190, -0.010)
_LIGHT = (0.95, -0.015, 0.110)
_N = 256
# The signed scale runs from dark at zero through orange for positive and through blue for negative values, equally
# light at equal size. Orange and blue stay apart with red-green colour blindness.
_ZERO = (0.20, 0.000, -0.020)
_POSITIVE = ((0.60, 0.110, 0.130), (0.93, 0.000, 0.100))
_NEGATIVE = ((0.56, -0.030, -0.210), (0.93, -0.050, -0.040))

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

# Lightnesses that stand out on paper and on ink, and the chromas and hues from which label colours are chosen.
_LABEL_LIGHTNESS = (0.44, 0.52, 0.60, 0.68, 0.76, 0.84)
_LABEL_CHROMA = (0.03, 0.09, 0.13, 0.17, 0.21)
_GREYISH = 0.05
_LABEL_HUES = 72
# Linear sRGB as seen with common vision, protanopia and deuteranopia: Machado et al. 2009, severity 1.
_VISIONS = np.array(
    [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ]
)
# Common vision has more room: its distances count half.
_WEIGHTS = np.array([[0.5], [1.0], [1.0]])


def _oklab_to_srgb(lab: Floats) -> Floats:
    """sRGB in 0..1 of OKLab colours [..., 3]."""
    linear = np.clip((lab @ _TO_LMS.T) ** 3 @ _TO_RGB.T, 0, 1)
    return np.asarray(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))


def scale_in_oklab() -> Floats:
    """The scale as OKLab colours [256, 3] at equal distances."""
    return _bezier(_N, _INK, _ROSE, _LIGHT)


def signed_scale_in_oklab() -> Floats:
    """The signed scale as OKLab colours [255, 3], from -1 to 1 with 0 in the middle."""
    half = _N // 2
    return np.concatenate([_bezier(half, _ZERO, *_NEGATIVE)[:0:-1], _bezier(half, _ZERO, *_POSITIVE)])


def _bezier(n: int, *points: tuple[float, float, float]) -> Floats:
    """[n, 3] colours at equal distances on the quadratic Bézier curve of three points."""
    start, middle, end = (np.array(point) for point in points)
    t = np.linspace(0, 1, 4001)[:, None]
    curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    at = np.linspace(0, length[-1], n)
    return np.stack([np.interp(at, length, curve[:, axis]) for axis in range(3)], axis=1)


SCALE: Floats = _oklab_to_srgb(scale_in_oklab())
"""The scale in sRGB, 0..1, [256, 3]."""
SIGNED: Floats = _oklab_to_srgb(signed_scale_in_oklab())
"""The signed scale in sRGB, 0..1, [255, 3]."""


def scale_rgb(share: NDArray[np.floating]) -> Floats:
    """sRGB colours [..., 3] of values in 0..1."""
    index = np.clip(np.nan_to_num(np.asarray(share)) * (_N - 1), 0, _N - 1)
    return np.asarray(SCALE[np.rint(index).astype(int)])


def signed_rgb(share: NDArray[np.floating]) -> Floats:
    """sRGB colours [..., 3] of values in -1..1."""
    index = np.clip((np.nan_to_num(np.asarray(share)) + 1) / 2, 0, 1) * (len(SIGNED) - 1)
    return np.asarray(SIGNED[np.rint(index).astype(int)])


def scale_hex(share: float) -> str:
    """One colour of the scale as `#rrggbb`."""
    return _hex(scale_rgb(np.array(share)))


def _hex(rgb: Floats) -> str:
    return "#" + "".join(f"{round(float(part) * 255):02x}" for part in rgb)


def ink_on(share: float) -> str:
    """The text colour, dark or light, with the higher contrast on that colour of the scale."""
    rgb = scale_rgb(np.array(share))
    luminance = float(_linear(rgb) @ np.array([0.2126, 0.7152, 0.0722]))
    return "#08050c" if (luminance + 0.05) / 0.0517 > 1.05 / (luminance + 0.05) else "#ffffff"


def scale_gradient() -> str:
    """The scale as a CSS gradient, left to right."""
    return "linear-gradient(90deg, " + ", ".join(scale_hex(i / 12) for i in range(13)) + ")"


def signed_gradient() -> str:
    """The signed scale as a CSS gradient, negative on the left, positive on the right."""
    return "linear-gradient(90deg, " + ", ".join(_hex(rgb) for rgb in signed_rgb(np.linspace(-1, 1, 17))) + ")"


@lru_cache(maxsize=4)
def label_colours(greyish: tuple[bool, ...]) -> tuple[str, ...]:
    """A colour as `#rrggbb` for each label, a greyish one where asked, as for backgrounds.

    Each is the colour farthest from all before it, by the smallest of its distances in common vision, protanopia and
    deuteranopia.
    """
    lightness, chroma, hue = np.meshgrid(
        _LABEL_LIGHTNESS, _LABEL_CHROMA, np.linspace(0, 2 * np.pi, _LABEL_HUES, endpoint=False), indexing="ij"
    )
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1).reshape(-1, 3)
    rgb = _oklab_to_srgb(lab)
    shown = np.linalg.norm(_linear_to_oklab(_linear(rgb)) - lab, axis=1) < 0.005  # within the gamut of sRGB
    rgb = rgb[shown]
    linear = _linear(rgb)
    seen = np.stack([_linear_to_oklab(np.clip(linear @ vision.T, 0, 1)) for vision in _VISIONS])
    is_greyish = np.linalg.norm(lab[shown, 1:], axis=1) < _GREYISH
    nearest = np.abs(seen[0, :, 2])  # begin with the yellowest or bluest, which everybody sees
    colours: list[str] = []
    for wanted in greyish:
        best = int(np.argmax(np.where(is_greyish == wanted, nearest, -1)))
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
