"""Write docs/metrics.md: every metric and every alert, from the code and the rules (`make docs`)."""

import re
from collections.abc import Iterable
from pathlib import Path

import yaml
from prometheus_client import Counter, Gauge, Histogram

from shared import metrics

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "metrics.md"
RULES = ROOT / "ops" / "prometheus" / "alerts.yml"
INTRODUCTION = """\
# Metrics and alerts

`make docs` writes this page from `shared/metrics.py` and `ops/prometheus/alerts.yml`, and a test keeps it current.
[Operations](operations.md#metrics-and-alerts) says who reads the metrics, and where the alerts go.
"""
METRICS = """\
## Metrics

The API serves them at `/metrics`, and every other process on `metrics.port`. A histogram `x` has the series `x_bucket`,
`x_sum` and `x_count`.
"""
ALERTS = """\
## Alerts

An alert fires when its cause has lasted for the time of its row. `page` needs a person at once, `ticket` within days.
Words in capitals stand for values.
"""


def page() -> str:
    """The whole text of docs/metrics.md."""
    measured = [metric for metric in vars(metrics).values() if isinstance(metric, Counter | Gauge | Histogram)]
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    return "\n".join(
        [
            INTRODUCTION,
            METRICS,
            *_table(("metric", "type", "labels", "meaning"), sorted(map(_metric, measured))),
            ALERTS,
            *_table(("alert", "severity", "after", "meaning", "first thing to do"), map(_alert, rules)),
        ]
    )


def _metric(metric: metrics.Metric) -> tuple[str, ...]:
    (described,) = metric.describe()
    name = described.name + ("_total" if isinstance(metric, Counter) else "")
    labels = ", ".join(f"`{label}`" for label in metric._labelnames)
    return f"`{name}`", described.type, labels, described.documentation


def _alert(rule: dict[str, object]) -> tuple[str, ...]:
    labels, notes = rule["labels"], rule["annotations"]
    assert isinstance(labels, dict)
    assert isinstance(notes, dict)
    meaning = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: found[1].upper(), notes["summary"])
    meaning = re.sub(r"\{\{ \$value[^}]*\}\}", "N", meaning)
    return f"`{rule['alert']}`", labels["severity"], str(rule.get("for", "0m")), meaning, notes["action"]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(each.replace("|", r"\|") for each in row) + " |" for row in cells] + [""]


if __name__ == "__main__":
    PAGE.write_text(page())
