"""Compute the figures of the model card: retrieval recall, similarity ranges, autoencoder PSNR."""

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from starter.train.autoencoder import decode, encode, psnr
from starter.train.clip import tokenize
from starter.train.dataset import to_unit
from starter.train.queries import Query, QueryStage
from starter.train.scenes import HALF_SIDE, SceneMaker
from starter.train.texts import plural

NONSENSE = (
    "qwv zzxk plorf",
    "asdf jkl qwerty",
    "gnarble frotz whelm",
    "the of and to in",
    "quarterly tax compliance report",
    "xkcd 7781 blorp",
    "stochastic gradient descent",
    "lorem ipsum dolor sit amet",
    "hypothecation of derivatives",
    "zzzzzz",
    "brutalist municipal zoning ordinance",
    "1234567890",
)


@torch.no_grad()
def text_vectors(clip: Any, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Return the L2-normalised vectors of texts, float32 (N, E)."""
    clip.eval()
    ids = tokenize(tokenizer, texts)
    return torch.cat([F.normalize(clip.encode_text(batch).float(), dim=-1) for batch in torch.split(ids, 128)])


def recall(queries: Tensor, store: Tensor, concept: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Return the share of queries with an image of their concept among the k nearest.

    Args:
        queries: one per concept, in the order of the concept numbers, shape (C, E).
        store: vectors of the images, shape (N, E).
        concept: concept numbers of the images, shape (N,). Concepts without an image are left out.
    """
    nearest = (queries @ store.T).topk(max(ks), dim=1).indices
    hits = concept[nearest] == torch.arange(len(queries))[:, None]
    present = torch.zeros(len(queries), dtype=torch.bool)
    present[concept] = True
    return {f"r_at_{k}": round(hits[present, :k].any(dim=1).float().mean().item(), 4) for k in ks}


def similarity_ranges(queries: Tensor, nonsense: Tensor, store: Tensor, concept: Tensor) -> dict[str, list[float]]:
    """Return the 5th, 50th and 95th percentile of text-image cosines for four groups of pairs.

    `right`: matching pairs. `best`: each name with its nearest image. `random`: random pairs. `nonsense_best`: each
    nonsense text with its nearest image.
    """
    similarity = queries @ store.T
    right = similarity[concept, torch.arange(len(store))]
    shuffled = similarity[torch.randperm(len(queries))[concept], torch.arange(len(store))]
    groups = {
        "right": right,
        "best": similarity.max(dim=1).values,
        "random": shuffled,
        "nonsense_best": (nonsense @ store.T).max(dim=1).values,
    }
    points = torch.tensor([0.05, 0.5, 0.95])
    return {name: [round(x, 3) for x in values.quantile(points).tolist()] for name, values in groups.items()}


def everyday_queries(stage: QueryStage, *, most: int = 600) -> dict[str, float]:
    """Return the share of right images among the first three of each kind of query, at most `most` of each kind.

    `absent_auc`: probability that the best image of a name is nearer than the best image of an absent thing.
    """
    texts: dict[str, list[Query]] = {
        "plural": [(f"two {plural(name)}", stage.images([name])) for name in stage.names],
        **{kind: stage.texts[kind] for kind in ("same", "narrower", "broader", "theme")},
    }
    found = {}
    for kind, queries in texts.items():
        chosen = queries[:: math.ceil(len(queries) / most)]
        nearest = (_vectors(stage, [text for text, _ in chosen]) @ stage.store.T).topk(3).indices.tolist()
        shares = [
            len(set(right).intersection(row)) / min(3, len(right))
            for (_, right), row in zip(chosen, nearest, strict=True)
        ]
        found[kind] = round(statistics.mean(shares), 3)
    present, absent = (
        (_vectors(stage, words) @ stage.store.T).max(dim=1).values for words in (stage.names, stage.vocabulary.absent)
    )
    return {**found, "absent_auc": round((present[:, None] > absent).float().mean().item(), 3)}


def _vectors(stage: QueryStage, texts: Sequence[str]) -> Tensor:
    return text_vectors(stage.module, stage.tokenizer, list(texts))


def reconstruction_psnr(autoencoder: AutoencoderKLFlux2, scenes: SceneMaker, *, count: int = 64) -> float:
    """Return the mean PSNR in dB of `count` reconstructed scenes with two or three things, with a fixed seed."""
    rng = random.Random(0)
    values = []
    for index in range(count):
        picture = np.asarray(scenes.scene(rng, references=2 + index % 2, side=HALF_SIDE).picture)
        image = to_unit(torch.from_numpy(picture.transpose(2, 0, 1)[None].copy()))
        decoded = decode(autoencoder, encode(autoencoder, image)).clamp(-1, 1)
        values.append(psnr((decoded - image).pow(2).mean()).item())
    return round(statistics.mean(values), 2)
