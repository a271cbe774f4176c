"""Arithmetic on embedding vectors."""

import numpy as np
from numpy.typing import NDArray


def l2_normalised(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Each vector divided by its length. vectors: shape (dim,) or (n, dim), no vector of length 0."""
    normalised: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    return normalised
