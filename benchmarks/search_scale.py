"""How do searches grow with the corpus?

    make up && . var/stack.env && .venv/bin/python -m benchmarks.search_scale --sizes 10000,100000,1000000

For each size it fills a database of its own on the stack's server with made-up vectors and captions. It builds the
index and prints its time and size. Then it measures searches at a recall of 0.95 and of 0.99, without a filter and with
filters. It measures inserts while the index is live, and hybrid against vector searches. It writes a table and a plot
into `out/bench`. A million vectors need 6 GB of disk and, on two cores, more than an hour.

The vectors lie near a random subspace of few dimensions, as those of a CLIP do: each has nearer and farther neighbours.
Independent random vectors have no near ones, and no graph index finds those of 512 components well.
"""

import argparse
import io
import math
import statistics
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
from alembic import command
from alembic.config import Config
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, Engine, NullPool, create_engine, select, text
from sqlalchemy.orm import Session

from benchmarks.conditions import RESULTS_FOLDER, save
from shared import retrieval
from shared.contracts.search import ImageFilter, SearchMode
from shared.db import images, search_tuning, spaces
from shared.db.images import Vector
from shared.db.session import database_url, unbounded_waits
from shared.db.spaces import Space
from shared.db.tables import Collection
from shared.settings import RetrievalSettings, get_settings

REPOSITORY = Path(__file__).parents[1]
DATABASE = "afterimage_search_scale"
SUBSPACE_DIM = 24
SPREAD = 0.3
"""Length of a vector's part outside of the subspace, relative to the part inside. With 24 dimensions, the 20 nearest of
20,000 vectors give an intrinsic dimension of 22 (Levina and Bickel, NIPS 2004). That of the starter corpus is 7, so its
neighbours are easier to find."""
PER_KIND = 50
"""Images whose captions name the same kind."""
FILTERS = {"50 %": 2, "5 %": 20, "0.5 %": 200, "0.05 %": 2000}
"""Filters by the share of the images that they let through. One of so many images has the tag `every-N`."""
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "grey", "brown")
CHUNK = 10_000


@dataclass
class Scale:
    """The figures of one size. ms_*: by recall and filter, p50 and p95."""

    vectors: int
    load_s: float = 0.0
    build_s: float = 0.0
    index_mb: float = 0.0
    table_mb: float = 0.0
    inserts_per_s: float = 0.0
    hybrid_ratio: float = 0.0
    ef_search: dict[str, int] = field(default_factory=dict)
    recall: dict[str, float] = field(default_factory=dict)
    p50_ms: dict[str, float] = field(default_factory=dict)
    p95_ms: dict[str, float] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=_sizes, default=[10_000, 100_000], help="numbers of vectors (default: 10000,100000)"
    )
    parser.add_argument("--dim", type=int, default=512, help="components of a vector (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=100, help="searches per figure (default: %(default)s)")
    parser.add_argument("--memory-mb", type=int, default=2048, help="memory of the build (default: %(default)s)")
    arguments = parser.parse_args()
    scales: list[Scale] = []
    for size in arguments.sizes:
        with _database() as engine:
            scales.append(_measure(engine, size, arguments))
        _print(scales)
    slope = _slope(scales)
    save("search_scale", {"scales": [asdict(scale) for scale in scales], "slope": slope}, **vars(arguments))
    _plot(scales, RESULTS_FOLDER / "search_scale.png")
    if slope is not None:
        print(f"slope of log p50 by log size, recall 0.95, no filter: {slope:.2f}")


def _measure(engine: Engine, size: int, arguments: argparse.Namespace) -> Scale:
    scale, console = Scale(size), Console(stderr=True)
    rng = np.random.default_rng(0)
    subspace = rng.standard_normal((SUBSPACE_DIM, arguments.dim), dtype=np.float32)
    with Session(engine) as session, session.begin():
        space = spaces.ensure(session, digest="scale", model="made up", dim=arguments.dim)
        collection_id = session.scalars(select(Collection.id).where(Collection.name == "shared")).one()

    # 1. Rows and vectors without the index, then the index.
    with engine.connect() as connection:
        connection.execute(text(f"drop index ix_{space.table.name}_embedding"))
        connection.commit()
        started = time.perf_counter()
        for first in range(0, size, CHUNK):
            count = min(CHUNK, size - first)
            load(connection, space, collection_id, _near(subspace, count, rng), first=first)
            console.print(f"{first + count:,} of {size:,} loaded", end="\r")
        scale.load_s = time.perf_counter() - started
        connection.execute(text(f"set maintenance_work_mem = '{arguments.memory_mb:d}MB'"))
        connection.execute(text("set max_parallel_maintenance_workers = 2"))
        started = time.perf_counter()
        connection.execute(
            text(
                f"create index ix_{space.table.name}_embedding on {space.table.name} "
                "using hnsw (embedding halfvec_cosine_ops) with (m = 16, ef_construction = 128)"
            )
        )
        connection.commit()
        scale.build_s = time.perf_counter() - started
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("vacuum analyze"))
        sizes = connection.execute(
            text("select pg_relation_size(:index), pg_total_relation_size(:table) - pg_indexes_size(:table)"),
            {"index": f"ix_{space.table.name}_embedding", "table": space.table.name},
        ).one()
        scale.index_mb, scale.table_mb = sizes[0] / 2**20, sizes[1] / 2**20

    # 2. Searches, at the `ef_search` that reaches each recall.
    queries = _near(subspace, arguments.queries, rng)
    settings = get_settings().retrieval
    for target in (0.95, 0.99):
        with Session(engine) as session, session.begin():
            tuning = search_tuning.measure(session, space, target=target, queries=arguments.queries)
            search_tuning.store(session, space, tuning)
        with Session(engine) as session:
            space = spaces.find(session, space.digest) or space  # with this measurement
        tuned = tuning.searches[0]
        scale.ef_search[f"{target:g}"] = tuned.ef_search
        scale.ef_search[f"{target:g}, filtered"] = tuned.ef_search_filtered or tuned.ef_search
        for name, every in {"none": 1, **FILTERS}.items():
            where = ImageFilter(tags=[f"every-{every}"] if every > 1 else [])
            _time_searches(engine, space, collection_id, queries, where, settings, scale, key=f"{target:g}, {name}")

    # 3. Hybrid against vector searches, one after the other for each query.
    scale.hybrid_ratio = _hybrid_ratio(engine, space, collection_id, queries, settings)

    # 4. Inserts while the index is live.
    with engine.connect() as connection:
        started = time.perf_counter()
        count = min(1000, size // 10)
        load(connection, space, collection_id, _near(subspace, count, rng), first=size)
        scale.inserts_per_s = count / (time.perf_counter() - started)
    return scale


def _time_searches(
    engine: Engine,
    space: Space,
    collection_id: UUID,
    queries: Vector,
    where: ImageFilter,
    settings: RetrievalSettings,
    scale: Scale,
    *,
    key: str,
) -> None:
    times, recalls = [], []
    for query in queries:
        with Session(engine) as session:
            search = partial(
                images.nearest, session, space, query, k=10, collection_id=collection_id, where=where, ef_search=None
            )
            truth = search(exact_below=2**31 - 1).images
            started = time.perf_counter()
            found = search(exact_below=settings.exact_below).images
            times.append(1000 * (time.perf_counter() - started))
        lowest = truth[-1].similarity - search_tuning.SAME_SIMILARITY
        recalls.append(sum(each.similarity >= lowest for each in found) / len(truth))
    scale.recall[key] = statistics.mean(recalls)
    scale.p50_ms[key] = statistics.median(times)
    scale.p95_ms[key] = float(np.percentile(times, 95))


def _hybrid_ratio(
    engine: Engine, space: Space, collection_id: UUID, queries: Vector, settings: RetrievalSettings
) -> float:
    times: dict[SearchMode, list[float]] = {SearchMode.VECTOR: [], SearchMode.HYBRID: []}
    for index, query in enumerate(queries):
        for mode, taken in times.items():
            with Session(engine) as session:
                started = time.perf_counter()
                retrieval.find_candidates(
                    session,
                    space,
                    text=f"two {COLOURS[index % len(COLOURS)]} things of kind {index}",
                    vector=query,
                    k=10,
                    mode=mode,
                    collection_id=collection_id,
                    where=ImageFilter(),
                    settings=settings,
                )
                taken.append(time.perf_counter() - started)
    return statistics.median(times[SearchMode.HYBRID]) / statistics.median(times[SearchMode.VECTOR])


# --- made-up data -------------------------------------------------------------------------------------------------


def load(connection: Connection, space: Space, collection_id: UUID, vectors: Vector, *, first: int) -> list[UUID]:
    """Insert searchable images with these vectors, by COPY, and return their ids.

    vectors: shape (n, space.dim), float32, L2-normalised. first: number of the first image, from which its caption and
    tags follow. Every second image has the tag `every-2`, and so on for FILTERS.
    """
    ids = [uuid4() for _ in vectors]
    rows = io.StringIO()
    for number, image_id in enumerate(ids, start=first):
        tags = [f"every-{every}" for every in FILTERS.values() if number % every == 0]
        caption = f"a {COLOURS[number % len(COLOURS)]} thing of kind {number // PER_KIND}"
        key = f"scale/{number}"
        fields = (image_id, collection_id, "ready", f"{number:064x}", key, key, "png", 64, 64, 1, caption)
        rows.write("\t".join(map(str, fields)) + "\t{" + ",".join(tags) + "}\t0\n")
    embeddings = io.BytesIO()
    embeddings.write(b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0))
    for image_id, vector in zip(ids, vectors.astype(">f2"), strict=True):
        embedding = struct.pack(">HH", len(vector), 0) + vector.tobytes()
        embeddings.write(struct.pack(">hi16s", 3, 16, image_id.bytes))
        embeddings.write(struct.pack(">i", len(embedding)) + embedding + struct.pack(">if", 4, 1.0))
    embeddings.write(struct.pack(">h", -1))
    rows.seek(0)
    embeddings.seek(0)
    columns = (
        "id, collection_id, state, sha256, blob_key, thumbnail_key, format, width, height, size_bytes, caption, tags, "
        "perceptual_hash"
    )
    cursor: Any = connection.connection.cursor()  # psycopg2's, which has COPY
    with unbounded_waits():
        cursor.copy_expert(f"copy images ({columns}) from stdin", rows)
        cursor.copy_expert(
            f"copy {space.table.name} (image_id, embedding, norm) from stdin with (format binary)", embeddings
        )
    cursor.close()
    connection.commit()
    return ids


def _near(subspace: Vector, count: int, rng: np.random.Generator) -> Vector:
    """`count` random unit vectors near the subspace that the rows of `subspace` span."""
    inside = _unit(rng.standard_normal((count, len(subspace)), dtype=np.float32) @ subspace)
    outside = _unit(rng.standard_normal((count, subspace.shape[1]), dtype=np.float32))
    return _unit(inside + SPREAD * outside)


def _unit(vectors: Vector) -> Vector:
    normalised: Vector = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normalised


# --- the database and the report ----------------------------------------------------------------------------------


@contextmanager
def _database() -> Iterator[Engine]:
    """A migrated database of its own, on the server of the settings, dropped at the end. No statement has a limit."""
    url = database_url(get_settings().database)
    server = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"drop database if exists {DATABASE} with (force)"))
        connection.execute(text(f"create database {DATABASE}"))
    own = url.set(database=DATABASE)
    config = Config(REPOSITORY / "alembic.ini")
    config.cmd_opts = None
    config.attributes["url"] = own
    command.upgrade(config, "head")
    engine = create_engine(own)
    try:
        yield engine
    finally:
        engine.dispose()
        with server.connect() as connection:
            connection.execute(text(f"drop database {DATABASE} with (force)"))
        server.dispose()


def _print(scales: Sequence[Scale]) -> None:
    table = Table("vectors", "load s", "build s", "index MB", "vectors MB", "inserts/s", "hybrid / vector")
    for scale in scales:
        table.add_row(
            f"{scale.vectors:,}",
            f"{scale.load_s:.0f}",
            f"{scale.build_s:.0f}",
            f"{scale.index_mb:.0f}",
            f"{scale.table_mb:.0f}",
            f"{scale.inserts_per_s:.0f}",
            f"{scale.hybrid_ratio:.2f}",
        )
    searches = Table("vectors", "recall, filter", "ef_search", "measured recall", "p50 ms", "p95 ms")
    for scale in scales:
        for key, recall in scale.recall.items():
            target, _, name = key.partition(", ")
            width = scale.ef_search[target if name == "none" else f"{target}, filtered"]
            times = f"{scale.p50_ms[key]:.1f}", f"{scale.p95_ms[key]:.1f}"
            searches.add_row(f"{scale.vectors:,}", key, str(width), f"{recall:.3f}", *times)
    console = Console()
    console.print(table)
    console.print(searches)


def _slope(scales: Sequence[Scale]) -> float | None:
    """The slope of log p50 by log size, fitted by least squares; `None` for a single size."""
    if len(scales) < 2:
        return None
    sizes = [math.log(scale.vectors) for scale in scales]
    return float(np.polyfit(sizes, [math.log(scale.p50_ms["0.95, none"]) for scale in scales], 1)[0])


def _plot(scales: Sequence[Scale], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="vectors", ylabel="p50, milliseconds")
    for key in scales[0].p50_ms:
        axes.plot([scale.vectors for scale in scales], [scale.p50_ms[key] for scale in scales], marker="o", label=key)
    axes.legend(title="recall, filter", fontsize="small")
    figure.savefig(path)


def _sizes(text_of_sizes: str) -> list[int]:
    sizes = sorted(int(size) for size in text_of_sizes.split(","))
    if sizes[0] <= max(search_tuning.KS) * 2:
        raise ValueError
    return sizes


if __name__ == "__main__":
    main()
