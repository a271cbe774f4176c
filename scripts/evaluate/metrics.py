"""Measures on arrays: vectors are L2-normalised, shape (n, dim); images uint8, shape (height, width, 3)."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]
Pixels = npt.NDArray[np.uint8]


def best_relevant_ranks(similarities: Floats, relevant: npt.NDArray[np.bool_]) -> Integers:
    """Return the rank, from 0, of the best relevant item of each query; both arguments have shape (queries, items).

    Raises:
        ValueError: a query has no relevant item.
    """
    if not relevant.any(axis=1).all():
        raise ValueError("a query has no relevant item")
    order = np.argsort(-similarities, axis=1, kind="stable")
    ranks: Integers = np.take_along_axis(relevant, order, axis=1).argmax(axis=1)
    return ranks


def recall_at(k: int, ranks: Integers) -> float:
    """Return the share of queries whose best relevant item is among the first k."""
    return float((ranks < k).mean())


def mean_reciprocal_rank(ranks: Integers) -> float:
    return float((1 / (ranks + 1)).mean())


def precision_at(k: int, similarities: Floats, relevant: npt.NDArray[np.bool_]) -> float:
    """Return the mean share of relevant items among the first k of each query; shapes (queries, items)."""
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return float(np.take_along_axis(relevant, order, axis=1).mean())


def name_ranks(images: Floats, names: Floats, truth: int) -> Integers:
    """Count the other names that are at least as similar to each image as the true one, `names[truth]`; 0 is correct.

    Equal similarity counts against the truth, so a judge that gives all names the same similarity gets no credit.
    """
    similarities = images @ names.T
    ranks: Integers = (similarities >= similarities[:, [truth]]).sum(axis=1) - 1
    return ranks


def mean_similarity(images: Floats, others: Floats) -> Floats:
    """Return the mean cosine of each image with all of `others`, shape (n,); NaN without others."""
    return (images @ others.T).mean(axis=1) if len(others) else np.full(len(images), np.nan)


def max_similarity(images: Floats, others: Floats) -> Floats:
    """Return the cosine of each image with the most similar of `others`, shape (n,); NaN without others."""
    return (images @ others.T).max(axis=1) if len(others) else np.full(len(images), np.nan)


def min_pixel_distance(image: Image.Image, others: Sequence[Image.Image]) -> float:
    """Return the least root mean square difference to `others`, in [0, 1]; NaN without others.

    The others are scaled to the image's size.
    """
    scaled = [other.resize(image.size, Image.Resampling.BICUBIC) for other in others]
    return min((_root_mean_square(np.asarray(image), np.asarray(other)) for other in scaled), default=float("nan"))


def _root_mean_square(a: Pixels, b: Pixels) -> float:
    return float(np.sqrt(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)) / 255)


def diversity(images: Floats) -> float:
    """Return the mean of 1 - cosine over all pairs; NaN for fewer than two images."""
    first, second = np.triu_indices(len(images), k=1)
    return 1 - float((images @ images.T)[first, second].mean()) if len(first) else float("nan")


def psnr_db(image: Floats, reconstruction: Floats) -> float:
    """Return the peak signal-to-noise ratio in dB of arrays in [0, 1]."""
    mean_square = float(np.mean((image - reconstruction) ** 2))
    return -10 * math.log10(max(mean_square, 1e-12))
