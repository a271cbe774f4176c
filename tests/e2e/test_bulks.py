"""A bulk on a whole stack whose API is killed while it receives the bulk."""

import hashlib
import http.client
import io
import json
import tarfile
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.e2e.conftest import Api
from tests.stack import RunningStack, wait_until

JSON_LINES = {"Content-Type": "application/jsonl"}
ITEMS = 200


@pytest.fixture
def api(stack: RunningStack) -> Iterator[Api]:
    api = Api(stack.url)
    yield api
    api.http.close()


def items_of(api: Api, bulk_id: str) -> Iterator[dict[str, Any]]:
    cursor = 0
    while True:
        page = api.http.get(f"/bulks/{bulk_id}/items", params={"cursor": cursor, "limit": 150}).raise_for_status()
        yield from page.json()["items"]
        if page.json()["next_cursor"] is None:
            return
        cursor = int(page.json()["next_cursor"])


def kill_api(api: Api, stack: RunningStack) -> None:
    """Kill the API with SIGKILL and wait until a new one answers."""
    before = stack.control.pid("api")
    stack.control.kill("api")

    def answers() -> bool:
        try:
            return stack.control.pid("api") not in (None, before) and api.http.get("/health/live").is_success
        except httpx.TransportError:
            return False

    wait_until(answers, timeout_s=60, what="the API to be started again")


def test_every_item_of_a_bulk_runs_once_although_the_api_was_killed_while_receiving(
    api: Api, stack: RunningStack
) -> None:
    header = json.dumps({"bulk": {"on_invalid": "skip", "defaults": {"kind": "generate", "num_images": 1}}}).encode()
    rows = [json.dumps({"prompt": f"bulk {n}", "custom_id": f"item-{n}", "seed": n}).encode() for n in range(ITEMS)]
    lines = [line + b"\n" for line in (header, *rows[:150], b'{"prompt": 7}', *rows[150:])]
    key = {"Idempotency-Key": "killed-while-receiving"}

    # 1. The API receives a part. It is killed while the client sends the rest.
    first = api.http.post(
        "/bulks", params={"complete": False}, content=b"".join(lines[:80]), headers={**JSON_LINES, **key}
    )
    bulk = first.raise_for_status().json()
    connection = http.client.HTTPConnection(urlsplit(stack.url).netloc, timeout=30)
    connection.putrequest("POST", f"/api/v1/bulks/{bulk['id']}/lines?from_line=80")
    connection.putheader("Content-Type", "application/jsonl")
    connection.putheader("Content-Length", str(sum(map(len, lines[80:]))))
    connection.endheaders()
    connection.send(b"".join(lines[80:130]))
    kill_api(api, stack)
    connection.close()

    # 2. The client asks how many lines have arrived, and sends the rest.
    resumed = api.http.get(f"/bulks/{bulk['id']}").raise_for_status().json()
    assert resumed["state"] == "receiving"
    digest = b""
    for line in lines[: resumed["received_lines"]]:
        digest = hashlib.sha256(digest + line.removesuffix(b"\n")).digest()
    assert resumed["digest"] == digest.hex()
    rest = api.http.post(
        f"/bulks/{bulk['id']}/lines",
        params={"from_line": resumed["received_lines"]},
        content=b"".join(lines[resumed["received_lines"] :]),
        headers=JSON_LINES,
    )
    assert (rest.status_code, rest.json()["total"], rest.json()["invalid"]) == (202, ITEMS, 1), rest.text

    # 3. The bulk completes, although the API is killed once more.
    kill_api(api, stack)
    wait_until(
        lambda: api.http.get(f"/bulks/{bulk['id']}").json()["state"] == "completed",
        timeout_s=180,
        what="the bulk to end",
    )
    again = api.http.post("/bulks", content=b"".join(lines), headers={**JSON_LINES, **key})
    assert (again.json()["id"], again.json()["state"]) == (bulk["id"], "completed")

    # 4. Every item has run once, and every file is intact.
    items = list(items_of(api, bulk["id"]))
    assert [item["custom_id"] for item in items] == [f"item-{n}" for n in range(ITEMS)]
    assert {(item["state"], len(item["outputs"])) for item in items} == {("succeeded", 1)}
    assert [item["outputs"][0]["seed"] for item in items] == list(range(ITEMS))
    assert len({item["job_id"] for item in items}) == ITEMS
    assert next(line["line"] for line in api.http.get(f"/bulks/{bulk['id']}/errors").json()["items"]) == 152
    archive = api.http.get(f"/bulks/{bulk['id']}/archive", timeout=120).raise_for_status().content
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert json.loads(files["end.json"]) == {"end": True, "items": ITEMS}
    for item in items:
        image = files[f"{item['line']:06d}-0.png"]
        assert hashlib.sha256(image).hexdigest() == item["outputs"][0]["sha256"]
        record = json.loads(files[f"{item['line']:06d}.json"])
        assert record["outputs"][0]["provenance"]["parameters"]["prompt"] == item["prompt"]
