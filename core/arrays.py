"""Names for the types of numpy arrays."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
"""float64"""
Float32s = NDArray[np.float32]
"""float32"""
Ints = NDArray[np.int64]
"""int64"""
Bools = NDArray[np.bool_]
"""bool"""
