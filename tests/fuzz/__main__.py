"""Test a running stack against its whole OpenAPI document with Schemathesis: `make fuzz`, or

    python -m tests.fuzz --examples 100 --seed 7

Two passes with every check: with a key that has all scopes, and without a key. A third pass sends bulks whose keys and
bytes are hostile. The command writes summary.json and the reports of Schemathesis into `out/fuzz/`. Its exit code is 1
when a check failed, or when it sent fewer requests than `--at-least`.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.fuzz import bulks
from tests.fuzz.hooks import SPARED
from tests.stack import RunningStack, running_stack

HERE = Path(__file__).parent
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
REQUEST_TIMEOUT_S = 10
SCOPES = ("generate", "search", "corpus:write", "admin")
PROFILE = {
    # Keys are required, generation costs nothing, and waits and streams end soon.
    "AFTERIMAGE_ENVIRONMENT": "test",
    "AFTERIMAGE_SECURITY__REQUIRE_API_KEYS": "true",
    "AFTERIMAGE_MODEL__GENERATORS": '{"cheap": {"kind": "fake"}}',
    "AFTERIMAGE_MODEL__DEFAULT_GENERATOR": "cheap",
    "AFTERIMAGE_API__MAX_WAIT_S": "0.5",
    "AFTERIMAGE_API__MAX_STREAM_S": "1",
    "AFTERIMAGE_LIMITS__READS_PER_MINUTE": "1000000",
    "AFTERIMAGE_LIMITS__WRITES_PER_MINUTE": "1000000",
}
SERVER_ERROR, TIMEOUT = "ServerError", "ResponseTimeExceeded"


@dataclass
class Findings:
    """The requests, failures and errors of all passes."""

    requests: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    errors: list[Any] = field(default_factory=list)

    def add(self, report: dict[str, Any]) -> None:
        self.requests += report["test_cases"]["generated"]
        self.failures += report["failures"]
        self.errors += report["errors"]

    def summary(self, seed: int) -> dict[str, Any]:
        counts = {failure["type"]: 0 for failure in self.failures}
        for failure in self.failures:
            counts[failure["type"]] += failure["count"]
        server_errors, timeouts = counts.pop(SERVER_ERROR, 0), counts.pop(TIMEOUT, 0)
        return {
            "seed": seed,
            "requests": self.requests,
            "server_errors": server_errors,
            "timeouts": timeouts,
            "schema_violations": sum(counts.values()),
            "violations_by_kind": counts,
            "errors": self.errors,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--examples", type=int, default=150, help="per operation and kind of data (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="repeats a run (default: random)")
    parser.add_argument(
        "--at-least", type=int, default=20_000, help="the least number of requests (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"seed {arguments.seed}")
    found = Findings()
    # No io worker: the service must not call the webhook URLs that Schemathesis invents.
    with (
        tempfile.TemporaryDirectory() as var,
        running_stack(Path(var), environment=PROFILE, options=("--io", "0")) as stack,
    ):
        for name, key in (("owner", stack.new_key("fuzz", *SCOPES)), ("anonymous", None)):
            found.add(run_pass(stack, name, key, arguments))
        hostile = bulks.run(
            stack.url,
            stack.new_key("fuzz", *SCOPES),
            examples=arguments.examples * 2,
            run_seed=arguments.seed,
        )
    found.requests += hostile.requests
    found.failures += hostile.failures
    (arguments.out / "bulks.json").write_text(json.dumps(hostile.failures, indent=2))
    summary = found.summary(arguments.seed)
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    if found.failures or found.errors or found.requests < arguments.at_least:
        raise SystemExit(1)


def run_pass(stack: RunningStack, name: str, key: str | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one pass over the document. Return the JSON report of Schemathesis."""
    report = arguments.out / f"{name}.json"
    command = [
        *(str(SCHEMATHESIS), "--config-file", str(HERE / "schemathesis.toml")),
        *("run", f"{stack.url}/api/v1/openapi.json"),
        *("--max-examples", str(arguments.examples), "--seed", str(arguments.seed)),
        *("--request-timeout", str(REQUEST_TIMEOUT_S), "--report", "json", "--report-json-path", str(report)),
    ]
    if key is not None:
        command += ["--header", f"Authorization: Bearer {key}"]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzz.hooks", SPARED: ",".join(own_ids(stack, key))}
    with open(arguments.out / f"{name}.log", "w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, env=environment)
    if key is not None:  # the service refuses every request with a revoked key, so such a pass shows nothing
        httpx.get(f"{stack.url}/api/v1/stats", headers={"Authorization": f"Bearer {key}"}).raise_for_status()
    answer: dict[str, Any] = json.loads(report.read_text())
    if not answer["complete"]:
        raise SystemExit(f"the pass as {name} did not end: see {log.name}")
    return answer


def own_ids(stack: RunningStack, key: str | None) -> list[str]:
    """The ids of a key and of its owner. The key has to be on the first page of the list."""
    if key is None:
        return []
    answer = httpx.get(f"{stack.url}/api/v1/admin/keys", headers={"Authorization": f"Bearer {key}"})
    keys = answer.raise_for_status().json()["items"]
    return next([each["id"], each["owner_id"]] for each in keys if key.startswith(each["begins_with"]))


if __name__ == "__main__":
    main()
