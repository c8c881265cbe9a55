"""The colours that mean something: one scale for bits, three for the stages.

Both are the same in light and dark, so that a saved picture reads like the page it came from.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STAGES = ("early", "middle", "late")
STAGE_COLOURS = {"early": "#4a7bd0", "middle": "#1f9e86", "late": "#d08a1d"}

# The scale is a curve in OKLab from ink through rose to lamplight. Lightness only rises along it, so that it reads
# in grey and with any colour blindness; steps of equal length along it look equally large.
_INK = (0.20, 0.020, -0.090)
_ROSE = (0.62, 0.190, -0.010)
_LIGHT = (0.95, -0.015, 0.110)
_N = 256


def _oklab_to_srgb(lab: Floats) -> Floats:
    """sRGB in 0..1 of OKLab colours [..., 3]; the two matrices are those of Ottosson's definition (2020)."""
    to_lms = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip((lab @ to_lms.T) ** 3 @ to_rgb.T, 0, 1)
    return np.asarray(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))


def scale_in_oklab() -> Floats:
    """The scale as OKLab colours [256, 3], equally far from each other."""
    t = np.linspace(0, 1, 4001)[:, None]
    curve = (1 - t) ** 2 * np.array(_INK) + 2 * t * (1 - t) * np.array(_ROSE) + t**2 * np.array(_LIGHT)
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    wanted = np.linspace(0, length[-1], _N)
    return np.stack([np.interp(wanted, length, curve[:, axis]) for axis in range(3)], axis=1)


SCALE: Floats = _oklab_to_srgb(scale_in_oklab())
"""sRGB of the scale in 0..1, [256, 3]."""


def scale_rgb(share: NDArray[np.floating]) -> Floats:
    """Colours [..., 3] in 0..1 of shares of the largest value, 0..1."""
    index = np.clip(np.nan_to_num(np.asarray(share)) * (_N - 1), 0, _N - 1)
    return np.asarray(SCALE[np.rint(index).astype(int)])


def scale_hex(share: float) -> str:
    """One colour of the scale as `#rrggbb`."""
    red, green, blue = (round(float(c) * 255) for c in scale_rgb(np.array(share)))
    return f"#{red:02x}{green:02x}{blue:02x}"


def ink_on(share: float) -> str:
    """The text colour, dark or light, that stands out more on that colour of the scale."""
    rgb = scale_rgb(np.array(share))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ np.array([0.2126, 0.7152, 0.0722]))
    return "#08050c" if (luminance + 0.05) / 0.0517 > 1.05 / (luminance + 0.05) else "#ffffff"


def scale_gradient() -> str:
    """The scale as a CSS gradient, left to right."""
    return "linear-gradient(90deg, " + ", ".join(scale_hex(i / 12) for i in range(13)) + ")"
