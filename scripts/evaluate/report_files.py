"""Write the figures, the chart and the contact sheets of an evaluation into a folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.evaluate import charts, report
from scripts.evaluate.evaluation import Evaluation, Models
from shared.retrieval import resolve_gate
from shared.settings import Settings
from shared.vectors import l2_normalised


def write_report_files(
    evaluation: Evaluation,
    measured: dict[str, Any],
    *,
    out: Path,
    queries: Sequence[str],
    models: Models,
    settings: Settings,
) -> list[Path]:
    """Write all files into the folder `out`, and return their paths.

    queries: texts for the sheet of searches.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = ("summary.json", "table.md", "chart.png", "sheet.png", "queries.png")
    summary, table, chart, sheet, searches = paths = [out / name for name in names]
    summary.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    table.write_text(report.markdown_report(measured), encoding="utf-8")
    charts.chart(measured, chart)
    charts.contact_sheet(evaluation).save(sheet)
    vectors = dict(zip(queries, l2_normalised(models.clip.encode_text(queries)), strict=True))
    gate = resolve_gate(None, settings.retrieval.min_similarity)
    charts.search_sheet(evaluation.full_store, vectors, min_similarity=gate.min_similarity).save(searches)
    return paths
