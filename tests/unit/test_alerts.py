"""Each alert fires for its cause, and ends when the cause is gone. Prometheus' promtool evaluates them."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

RULES = Path(__file__).resolve().parents[2] / "ops" / "prometheus" / "alerts.yml"
NAMES = [rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]

END = 140
"""Minutes of each test."""

HEALTHY = {
    **{f'up{{job="{job}", instance="{job}-1"}}': f"1x{END}" for job in ("api", "embed", "generate", "io")},
    'up{job="reconciler", instance="reconciler-1"}': f"1x{END}",
    **{f'component_up{{component="{name}"}}': f"1x{END}" for name in ("database", "broker", "cache", "storage")},
    "storage_free_bytes": f"500x{END}",
    "storage_size_bytes": f"1000x{END}",
    'queue_depth{queue="starter"}': f"3x{END}",
    "bulk_items_waiting": f"100x{END}",
    "webhooks_overdue": f"0x{END}",
    "calibration_outdated": f"0x{END}",
    'embedding_space_missing{space="a"}': f"0x{END}",
    'jobs_finished_total{state="succeeded"}': f"0+10x{END}",
    'jobs_finished_total{state="failed"}': f"0x{END}",
    'jobs_finished_total{state="dead"}': f"0x{END}",
    "leases_expired_total": f"0x{END}",
    "jobs_republished_total": f"0x{END}",
    "cache_fallbacks_total": f"0x{END}",
    'api_requests_total{status="200"}': f"0+100x{END}",
    'api_requests_total{status="500"}': f"0x{END}",
    'api_request_duration_seconds_bucket{route="/search", le="1"}': f"0+100x{END}",
    'api_request_duration_seconds_bucket{route="/search", le="5"}': f"0+100x{END}",
    'api_request_duration_seconds_bucket{route="/search", le="+Inf"}': f"0+100x{END}",
    # An event stream is open for minutes. It makes no request slow.
    'api_request_duration_seconds_bucket{route="/jobs/{job_id}/events", le="10"}': f"0x{END}",
    'api_request_duration_seconds_bucket{route="/jobs/{job_id}/events", le="+Inf"}': f"0+100x{END}",
}
"""Samples of a service under load, one per minute. The fast requests are those below 1 s."""

SLOW = f"0+100x10 1000x30 1000+100x{END - 40}"
"""A counter that stands still from minute 10 to minute 40."""
GONE = f"1x10 stale _x29 1x{END - 40}"
"""A series that ends in minute 10, as the name of a stopped container does, and comes back in minute 40."""


def between(normal: float, wrong: float) -> str:
    """A gauge that is wrong from minute 10 to minute 40."""
    return f"{normal:g}x9 {wrong:g}x30 {normal:g}x{END - 40}"


def growing(per_minute: float) -> str:
    """A counter that grows only from minute 10 to minute 40."""
    return f"0x9 0+{per_minute:g}x30 {per_minute * 30:g}x{END - 40}"


CAUSES: dict[str, dict[str, str]] = {
    "ProcessDown": {'up{job="embed", instance="embed-2"}': between(1, 0)},
    "NoApi": {'up{job="api", instance="api-1"}': GONE},
    "NoEmbedWorker": {'up{job="embed", instance="embed-1"}': GONE},
    "NoGenerateWorker": {'up{job="generate", instance="generate-1"}': GONE},
    "NoIoWorker": {'up{job="io", instance="io-1"}': GONE},
    "NoReconciler": {'up{job="reconciler", instance="reconciler-1"}': GONE},
    "ComponentDown": {'component_up{component="broker"}': between(1, 0)},
    "DiskNearlyFull": {"storage_free_bytes": between(500, 99)},
    "ApiErrors": {'api_requests_total{status="500"}': growing(10)},
    "ApiSlow": {'api_request_duration_seconds_bucket{route="/search", le="1"}': SLOW},
    "QueueStuck": {'jobs_finished_total{state="succeeded"}': SLOW, "bulk_items_waiting": f"0x{END}"},
    "BulkStuck": {'jobs_finished_total{state="succeeded"}': SLOW, 'queue_depth{queue="starter"}': f"0x{END}"},
    "JobsFail": {'jobs_finished_total{state="failed"}': growing(5)},
    "JobDead": {'jobs_finished_total{state="dead"}': f"0x20 1x{END - 20}"},
    "LeasesExpire": {"leases_expired_total": growing(1)},
    "EmbeddingSpaceIncomplete": {'embedding_space_missing{space="a"}': f"7x45 0x{END - 45}"},
    "WebhooksOverdue": {"webhooks_overdue": between(0, 4)},
    "CalibrationOutdated": {"calibration_outdated": f"1x70 0x{END - 70}"},
    "MessagesLost": {"jobs_republished_total": growing(3)},
    "CacheAway": {"cache_fallbacks_total": growing(30)},
}
FIRES_AT_MINUTE = {"CalibrationOutdated": 65}


def _expects(minute: int, *alerts: str) -> dict[str, Any]:
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in alerts]
    expr = 'count by (alertname) (ALERTS{alertstate="firing"})'
    return {"expr": expr, "eval_time": f"{minute}m", "exp_samples": samples}


def _run_promtool(tests: list[dict[str, Any]], folder: Path) -> subprocess.CompletedProcess[str]:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, a part of Prometheus, is not installed")
    file = folder / "tests.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "30s", "tests": tests}))
    return subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True)


def _test(series: dict[str, str], *expected: dict[str, Any]) -> dict[str, Any]:
    values = [{"series": name, "values": value} for name, value in (HEALTHY | series).items()]
    return {"interval": "1m", "input_series": values, "promql_expr_test": list(expected)}


def test_every_alert_has_a_cause() -> None:
    assert set(CAUSES) == set(NAMES)


def test_a_healthy_service_fires_no_alert(tmp_path: Path) -> None:
    done = _run_promtool([_test({}, *(_expects(minute) for minute in (5, 60, END)))], tmp_path)
    assert done.returncode == 0, done.stdout


def test_each_alert_fires_alone_for_its_cause_and_ends(tmp_path: Path) -> None:
    tests = [
        _test(series, _expects(5), _expects(FIRES_AT_MINUTE.get(name, 38), name), _expects(END)) | {"name": name}
        for name, series in CAUSES.items()
    ]
    done = _run_promtool(tests, tmp_path)
    assert done.returncode == 0, done.stdout
