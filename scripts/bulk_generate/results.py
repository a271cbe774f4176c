"""Write the results of a bulk as a JSON Lines manifest, a CSV table and an HTML contact sheet."""

import csv
import html
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scripts.bulk_generate.folder import write_atomically, write_json_line
from scripts.table_files import plain_cell

Record = dict[str, Any]

COLUMNS = [
    *("line", "row", "custom_id", "state", "file", "prompt", "negative_prompt", "model", "seed", "width", "height"),
    *(
        "mode",
        "references",
        "similarities",
        "job_id",
        "output_id",
        "sha256",
        "size_bytes",
        "error_code",
        "error_detail",
    ),
    *("created_at", "finished_at", "metadata"),
]


def write_results(records: Iterable[Record], *, manifest: Path, table: Path, sheet: Path, title: str) -> None:
    """Write all three files atomically, in one pass over the records.

    records: items of the service's manifest, each with its `row` and its `request`. Each output has its `file`,
        relative to the folder, or null.
    """
    with write_atomically(manifest) as lines, write_atomically(table) as csv_file, write_atomically(sheet) as page:
        rows = csv.DictWriter(csv_file, COLUMNS)
        rows.writeheader()
        page.write(_PAGE_START.replace("TITLE", html.escape(title)))
        for record in records:
            write_json_line(lines, record)
            for row in _table_rows(record):
                # Similarities are numbers, of which some begin with a minus.
                rows.writerow(
                    {name: value if name == "similarities" else plain_cell(value) for name, value in row.items()}
                )
                page.write(_figure(row))
        page.write(_PAGE_END)


def _table_rows(record: Record) -> Iterator[Record]:
    """Yield one row per output, or one row for an item without outputs."""
    parameters = record.get("parameters") or {}
    error = record.get("error") or {}
    common = {
        **{name: record.get(name) for name in ("line", "row", "custom_id", "state", "prompt", "model", "job_id")},
        **{name: record.get(name) for name in ("created_at", "finished_at")},
        "negative_prompt": parameters.get("negative_prompt"),
        "mode": (record.get("resolution") or {}).get("mode"),
        "error_code": error.get("code"),
        "error_detail": error.get("detail"),
        "metadata": json.dumps(record["metadata"], ensure_ascii=False) if record.get("metadata") else None,
    }
    if not record["outputs"]:
        yield common
    for output in record["outputs"]:
        references = output.get("references") or []
        yield common | {
            **{name: output.get(name) for name in ("file", "seed", "width", "height", "sha256", "size_bytes")},
            "output_id": output["id"],
            "references": " ".join(reference["image_id"] for reference in references),
            "similarities": " ".join(
                "-" if reference["similarity"] is None else f"{reference['similarity']:.4f}" for reference in references
            ),
        }


def _figure(row: Record) -> str:
    prompt = html.escape(str(row["prompt"]))
    details = html.escape(
        f"{row['custom_id']} · seed {row['seed']}" if row.get("seed") is not None else row["custom_id"] or ""
    )
    if row.get("file"):
        address = html.escape(quote(row["file"]))
        shown = f'<a href="{address}"><img loading="lazy" src="{address}" alt="{prompt}"></a>'
    else:
        reason = html.escape(f"{row['state']}: {row['error_detail'] or row['error_code'] or 'no image'}")
        shown = f'<p class="none">{reason}</p>'
    return f"<figure>{shown}<figcaption>{prompt}<small>{details}</small></figcaption></figure>\n"


_PAGE_START = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; font: 14px/1.35 system-ui, sans-serif; }
body { margin: 1.5rem; }
header { display: flex; flex-wrap: wrap; gap: 1rem; align-items: baseline; margin-bottom: 1rem; }
h1 { font-size: 1.2rem; margin: 0; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
figure[hidden] { display: none; }
img, .none { width: 100%; aspect-ratio: 1; object-fit: contain; background: color-mix(in srgb, CanvasText 6%, Canvas); }
.none { box-sizing: border-box; margin: 0; padding: .75rem; overflow: auto; color: #b3261e; }
small { display: block; opacity: .75; overflow-wrap: anywhere; }
</style>
<header><h1>TITLE</h1><label>Find <input type="search" id="find"></label></header>
<main>
"""
_PAGE_END = """</main>
<script>
document.getElementById("find").addEventListener("input", event => {
  const wanted = event.target.value.toLowerCase();
  for (const figure of document.querySelectorAll("figure"))
    figure.hidden = !figure.textContent.toLowerCase().includes(wanted);
});
</script>
</html>
"""
