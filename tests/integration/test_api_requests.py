"""Invalid requests at every endpoint: each gets a clear problem and changes no stored data."""

import base64
import gc
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.db.tables import Collection, Image, Job, JobEvent, Output
from shared.settings import Settings
from tests.factories import make_image, make_space
from tests.integration.conftest import API, Client, messages, picture

# Werkzeug's test client keeps large bodies in temporary files, and the garbage collector closes them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*(FileIO|SpooledTemporaryFile):pytest.PytestUnraisableExceptionWarning"
)

JSON_ROUTES = ["/generate", "/rag/generate", "/search"]
ID_ROUTES = [
    ("GET", "/images/{}"),
    ("PATCH", "/images/{}"),
    ("DELETE", "/images/{}"),
    ("GET", "/images/{}/content"),
    ("GET", "/images/{}/thumbnail"),
    ("GET", "/jobs/{}"),
    ("DELETE", "/jobs/{}"),
    ("GET", "/jobs/{}/events"),
    ("POST", "/jobs/{}/cancel"),
    ("POST", "/jobs/{}/retry"),
    ("GET", "/generations/{}"),
    ("DELETE", "/generations/{}"),
    ("GET", "/generations/{}/content"),
    ("GET", "/generations/{}/thumbnail"),
]


@pytest.fixture(autouse=True)
def _no_change_of_stored_data(client: Client, session: Session, settings: Settings) -> Iterator[None]:
    """Check that a test changed no stored data. Every request of this file must be refused."""
    before = _stored_data(session, settings)
    yield
    assert _stored_data(session, settings) == before
    gc.collect()


def _stored_data(session: Session, settings: Settings) -> dict[str, Any]:
    session.rollback()
    counts: dict[str, Any] = {
        table.__tablename__: session.scalar(select(func.count()).select_from(table))
        for table in (Collection, Output, Image, Job, JobEvent)
    }
    folder = Path(settings.storage.url.removeprefix("file://"))
    counts["blobs"] = sorted(str(path) for path in folder.rglob("*") if path.is_file())
    counts["messages"] = messages("generate.") + messages("embed.")
    return counts


def problem(answer: Any, status: int, code: str) -> Any:
    """Check that the answer is this problem, and return its body."""
    assert (answer.status_code, answer.json["code"]) == (status, code), answer.text
    assert answer.content_type == "application/problem+json"
    assert answer.json["status"] == status
    assert answer.json["title"]
    assert answer.json["detail"]
    assert answer.json["type"] == f"urn:afterimage:problem:{code}"
    assert answer.json["request_id"] == answer.headers["X-Request-ID"]
    assert "Traceback" not in answer.text
    return answer.json


def wrong_fields(answer: Any) -> list[str]:
    return [error["field"] for error in problem(answer, 422, "validation_failed")["errors"]]


# --- bodies -------------------------------------------------------------------------------------------------------


def test_a_body_that_is_not_json_is_malformed(subtests: pytest.Subtests, client: Client) -> None:
    for case, body in {
        "empty": b"",
        "open": b"{",
        "cut": b'{"prompt": "a"',
        "not-utf-8": b'{"prompt": "\xff"}',
        "lone-surrogate": b'{"prompt": "\\ud800"}',
        "nan": b'{"prompt": NaN',
        "text": b"not json",
        "deep": b"[" * 100_000,
        "utf-16": '{"prompt": "a"}'.encode("utf-16"),
    }.items():
        for route in JSON_ROUTES:
            with subtests.test(case=case, route=route):
                problem(client.post(API + route, data=body, content_type="application/json"), 400, "malformed_body")


def test_the_last_value_of_a_repeated_name_counts(client: Client) -> None:
    body = '{"prompt": "x", "dry_run": true, "seed": 1, "prompt": "y", "seed": 2}'
    answer = client.post(f"{API}/generate", data=body, content_type="application/json")
    assert answer.status_code == 200, answer.text
    assert (answer.json["parameters"]["prompt"], answer.json["parameters"]["seeds"]) == ("y", [2])


def test_a_body_with_another_content_type_is_refused(subtests: pytest.Subtests, client: Client) -> None:
    for content_type in [None, "text/plain", "application/x-www-form-urlencoded"]:
        for route in JSON_ROUTES:
            with subtests.test(content_type=content_type, route=route):
                body = json.dumps({"prompt": "a", "query": "a"})
                problem(client.post(API + route, data=body, content_type=content_type), 415, "unsupported_media_type")


def test_a_body_that_is_not_an_object_is_refused(subtests: pytest.Subtests, client: Client) -> None:
    for body in [[], "text", 3, None, True, [{"prompt": "a"}], '{"prompt": "a", "query": "a"}']:
        for route in JSON_ROUTES:
            with subtests.test(body=body, route=route):
                answer = client.post(API + route, data=json.dumps(body), content_type="application/json")
                assert wrong_fields(answer) == ["body"]


def test_a_wrong_field_is_named(subtests: pytest.Subtests, client: Client) -> None:
    for field, value in [
        ("prompt", ""),
        ("prompt", "   "),
        ("prompt", "x" * 2001),
        ("prompt", "nul \0 inside"),
        ("prompt", "bell \a inside"),
        ("prompt", 3),
        ("prompt", None),
        ("negative_prompt", "\0"),
        ("num_images", 0),
        ("num_images", 17),
        ("num_images", "3"),
        ("num_images", 1.5),
        ("num_images", True),
        ("num_images", 10**30),
        ("width", 15),
        ("width", 2049),
        ("width", -64),
        ("height", "512"),
        ("seed", -1),
        ("seed", 2**32),
        ("guidance_scale", -0.1),
        ("guidance_scale", 30.1),
        ("num_inference_steps", 0),
        ("num_inference_steps", 151),
        ("format", "gif"),
        ("format", "PNG"),
        ("quality", 101),
        ("lane", "express"),
        ("model", "../../etc/passwd"),
        ("model", "a" * 64),
        ("loras", {"x": 3.0}),
        ("loras", {"Not A Name": 1.0}),
        ("metadata", {"key": "nul \0"}),
        ("metadata", {"": "empty key"}),
        ("metadata", {str(i): "" for i in range(17)}),
        ("metadata", {"key": 3}),
        ("metadata", []),
        ("dry_run", "yes"),
        ("surprise", 1),
        ("Prompt", "a"),
    ]:
        for route in ["/generate", "/rag/generate"]:
            with subtests.test(field=field, value=value, route=route):
                wrong = wrong_fields(client.post(API + route, json={"prompt": "a red apple", field: value}))
                assert wrong
                assert all(name == f"body.{field}" or name.startswith(f"body.{field}.") for name in wrong)


def test_a_wrong_retrieval_field_is_named(subtests: pytest.Subtests, client: Client) -> None:
    for field, value in [
        ("similar_examples_count", 17),
        ("similar_examples_count", -1),
        ("mode", "magic"),
        ("reference_ids", ["not-an-id"]),
        ("reference_ids", [str(uuid4()) for _ in range(17)]),
        ("reference_ids", [{"image_id": str(uuid4()), "weight": 0}]),
        ("reference_ids", [{"image_id": str(uuid4()), "extra": 1}]),
        ("reference_ids", str(uuid4())),
        ("min_similarity", 1.1),
        ("strength", 0),
        ("strength", 1e-7),
        ("ip_adapter_scale", 2.1),
        ("filter", {"tags": ["nul \0"]}),
        ("filter", {"collection": "Not A Name"}),
        ("filter", {"created_after": "2026-01-01T00:00:00"}),
        ("filter", {"surprise": 1}),
        ("filter", None),
    ]:
        with subtests.test(field=field, value=value):
            wrong = wrong_fields(client.post(f"{API}/rag/generate", json={"prompt": "a red apple", field: value}))
            assert wrong
            assert all(name.startswith(f"body.{field}") for name in wrong)


def test_an_image_cannot_be_pinned_twice(client: Client) -> None:
    twice = [str(uuid4())] * 2
    assert wrong_fields(client.post(f"{API}/rag/generate", json={"prompt": "a", "reference_ids": twice})) == ["body"]


def test_all_wrong_fields_are_named_at_once_without_their_values(client: Client) -> None:
    answer = client.post(f"{API}/generate", json={"width": 7, "seed": -1, "format": "s3cret-value"})
    assert wrong_fields(answer) == ["body.prompt", "body.width", "body.seed", "body.format"]
    assert "s3cret-value" not in answer.text
    assert {error["code"] for error in answer.json["errors"]} == {
        "missing",
        "greater_than_equal",
        "enum",
    }


def test_an_invalid_search_is_refused(subtests: pytest.Subtests, client: Client) -> None:
    for body in [
        {},
        {"query": "a", "k": 0},
        {"query": "a", "k": 101},
        {"query": "a", "threshold": 1.5},
        {"query": "a", "diversity": -0.1},
        {"query": "a\0b"},
        {"query": "a", "image_id": "nonsense"},
        {"image_id": str(uuid4()), "image": "aaaa"},
        {"query": "a", "filter": {"attributes": {"a": "\0"}}},
        {"query": "a", "surprise": 1},
    ]:
        with subtests.test(body=body):
            assert wrong_fields(client.post(f"{API}/search", json=body))


def test_an_invalid_change_of_an_image_is_refused(subtests: pytest.Subtests, client: Client, session: Session) -> None:
    for body in [
        {"caption": "\0"},
        {"tags": "red"},
        {"tags": [""]},
        {"attributes": {"a": 1}},
        {"sha256": "x"},
        {"id": 1},
    ]:
        with subtests.test(body=body):
            image = make_image(session)
            session.commit()
            try:
                assert wrong_fields(client.patch(f"{API}/images/{image.id}", json=body))
                session.refresh(image)
                assert image.caption
            finally:
                session.delete(image)
                session.commit()


# --- paths and queries --------------------------------------------------------------------------------------------


def test_an_unknown_id_is_not_found_and_an_invalid_id_is_named(subtests: pytest.Subtests, client: Client) -> None:
    for method, route in ID_ROUTES:
        with subtests.test(method=method, route=route):
            body: dict[str, Any] = {"json": {}} if method == "PATCH" else {}
            problem(client.open(API + route.format(uuid4()), method=method, **body), 404, "not_found")
            for wrong in ("1", "not-an-id", "%00", "0" * 300):
                assert wrong_fields(client.open(API + route.format(wrong), method=method, **body)) == [
                    "path."
                    + {"images": "image_id", "jobs": "job_id", "generations": "generation_id"}[route.split("/")[1]]
                ]


def test_a_wrong_query_parameter_is_named(subtests: pytest.Subtests, client: Client) -> None:
    for route, query, field in [
        ("/jobs", "limit=0", "query.limit"),
        ("/jobs", "limit=101", "query.limit"),
        ("/jobs", "limit=ten", "query.limit"),
        ("/jobs", "limit=1&limit=2", "query.limit"),
        ("/jobs", "state=gone", "query.state"),
        ("/jobs", "created_after=yesterday", "query.created_after"),
        ("/jobs", "created_after=2026-01-01T00:00:00", "query.created_after"),
        ("/jobs", "created_before=0001-01-01T00:00:00%2B23:59", "query.created_before"),
        ("/jobs", "surprise=1", "query.surprise"),
        ("/images", "collection=NO", "query.collection"),
        ("/images", "collection=made-up", "query.collection"),
        ("/images", "tag=%00", "query.tag"),
        ("/images", "state=gone", "query.state"),
        ("/images", "cursor=" + "a" * 201, "query.cursor"),
        ("/generations", "reference_id=1", "query.reference_id"),
        (f"/jobs/{uuid4()}", "wait=-1", "query.wait"),
        (f"/jobs/{uuid4()}", "wait=nan", "query.wait"),
        (f"/jobs/{uuid4()}", "wait=inf", "query.wait"),
        (f"/jobs/{uuid4()}", "after=x", "query.after"),
        (f"/jobs/{uuid4()}/events", "after=-1", "query.after"),
        ("/rag/search", "", "query.prompt"),
        ("/rag/search", "prompt=%00", "query.prompt"),
        ("/rag/search", "prompt=a&k=0", "query.k"),
        ("/rag/search", "prompt=a&tags=a&tags=", "query.tags.1"),
    ]:
        with subtests.test(route=route, query=query, field=field):
            assert wrong_fields(client.get(f"{API}{route}?{query}")) == [field]


def test_an_invalid_cursor_is_refused(subtests: pytest.Subtests, client: Client) -> None:
    for cursor in [
        "nonsense",
        "é",
        "AAAA",
        base64.urlsafe_b64encode(b"2026-01-01 x").decode(),
        base64.urlsafe_b64encode(b"0001-01-01T00:00:00+23:59 " + str(uuid4()).encode()).decode(),
        base64.urlsafe_b64encode(b"2026-01-01T00:00:00 " + str(uuid4()).encode()).decode(),
    ]:
        for route in ["/jobs", "/images", "/generations", f"/images/{uuid4()}/generations"]:
            with subtests.test(cursor=cursor, route=route):
                problem(client.get(f"{API}{route}", query_string={"cursor": cursor}), 400, "invalid_cursor")


def test_an_invalid_last_event_id_is_refused(subtests: pytest.Subtests, client: Client) -> None:
    for last_id in ["x", "-1", "1.5", "9" * 30, "²"]:
        with subtests.test(last_id=last_id):
            answer = client.get(
                f"{API}/jobs/{uuid4()}/events", headers={"Last-Event-ID": last_id.encode().decode("latin1")}
            )
            assert wrong_fields(answer) == ["header.Last-Event-ID"]


def test_an_unknown_path_is_not_found(client: Client) -> None:
    for route in ("/nothing", f"{API}/nothing", f"{API}/generate/", f"{API}//jobs", "/%00"):
        answer = client.get(route)
        assert answer.status_code in (308, 404), route
    problem(client.get("/nothing"), 404, "not_found")


def test_a_method_that_is_not_allowed_gets_405_with_the_allowed_methods(
    subtests: pytest.Subtests, client: Client
) -> None:
    for method, route, allowed in [("GET", "/generate", "POST"), ("PUT", "/jobs", "GET"), ("POST", "/stats", "GET")]:
        with subtests.test(method=method, route=route, allowed=allowed):
            answer = client.open(API + route, method=method)
            problem(answer, 405, "method_not_allowed")
            assert allowed in answer.headers["Allow"]


def test_a_valid_request_id_is_returned_and_an_invalid_one_is_replaced(client: Client) -> None:
    assert client.get("/nothing", headers={"X-Request-ID": "abc-123"}).headers["X-Request-ID"] == "abc-123"
    for wrong in ("", "a b", "x" * 129, "a\tb", "é"):
        given = client.get("/nothing", headers={"X-Request-ID": wrong}).headers["X-Request-ID"]
        assert given != wrong
        assert given.isalnum()


# --- files --------------------------------------------------------------------------------------------------------


def upload(client: Client, *files: bytes, name: str = "image.png", **fields: Any) -> Any:
    sent = [(io.BytesIO(data), name) for data in files]
    return client.post(f"{API}/upload", data={"file": sent, **fields}, content_type="multipart/form-data")


def _animated(kind: str) -> bytes:
    from PIL import Image as Picture

    frames = [Picture.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


def _bomb() -> bytes:
    from PIL import Image as Picture

    file = io.BytesIO()
    Picture.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


def test_one_invalid_image_refuses_the_whole_request(
    subtests: pytest.Subtests, client: Client, session: Session
) -> None:
    make_space(session)  # a search needs an embedding space
    session.commit()
    for case, (data, status, code) in {
        "empty": (b"", 422, "invalid_image"),
        "cut-png": (picture()[:100], 422, "invalid_image"),
        "cut-jpeg": (picture(kind="JPEG")[:300], 422, "invalid_image"),
        "damaged-avif": (picture(kind="AVIF").replace(b"pitm", b"pitn"), 422, "invalid_image"),
        "header-only": (b"\x89PNG\r\n\x1a\n" + bytes(100), 422, "invalid_image"),
        "text": (b"just text", 415, "unsupported_image_type"),
        "gif": (picture(kind="GIF"), 415, "unsupported_image_type"),
        "tiff": (picture(kind="TIFF"), 415, "unsupported_image_type"),
        "bmp": (picture(kind="BMP"), 415, "unsupported_image_type"),
        "pdf": (b"%PDF-1.7", 415, "unsupported_image_type"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_image_type"),
        "animated-png": (_animated("PNG"), 422, "animated_image"),
        "animated-webp": (_animated("WEBP"), 422, "animated_image"),
        "bomb": (_bomb(), 413, "image_too_large"),
        "too-many-bytes": (picture() + bytes(17 * 2**20), 413, "image_too_large"),
    }.items():
        with subtests.test(case=case):
            body = problem(upload(client, picture(), data), status, code)
            assert body["context"]["index"] == 1
            sent = {"image": (io.BytesIO(data), "x.png")}
            problem(client.post(f"{API}/search", data=sent), status, code)
            encoded = base64.b64encode(data).decode()
            if data:
                problem(client.post(f"{API}/search", json={"image": encoded}), status, code)


def test_a_body_over_the_limit_is_refused(client: Client, settings: Settings) -> None:
    too_much = bytes(settings.api.max_body_bytes)
    problem(upload(client, too_much), 413, "body_too_large")
    answer = client.post(f"{API}/generate", data=too_much + b"{}", content_type="application/json")
    problem(answer, 413, "body_too_large")


def test_a_body_without_a_content_length_is_refused_at_the_limit(client: Client, settings: Settings) -> None:
    valid_up_to_the_limit = b'{"prompt": "a"}'.ljust(settings.api.max_body_bytes) + b"and more"
    answer = client.post(
        f"{API}/generate",
        input_stream=io.BytesIO(valid_up_to_the_limit),
        content_type="application/json",
        headers={"Transfer-Encoding": "chunked"},
        environ_overrides={"wsgi.input_terminated": True},
    )
    problem(answer, 413, "body_too_large")


def test_text_fields_of_a_form_have_their_own_limit(client: Client) -> None:
    problem(upload(client, picture(), caption="x" * 600_000), 413, "body_too_large")


def test_an_upload_without_a_file_or_with_too_many_is_refused(client: Client, settings: Settings) -> None:
    assert wrong_fields(client.post(f"{API}/upload", data={"caption": "x"}, content_type="multipart/form-data")) == [
        "form.file"
    ]
    assert wrong_fields(upload(client, *[b"x"] * (settings.api.max_upload_files + 1))) == ["form.file"]
    problem(upload(client, *[b"x"] * (settings.api.max_upload_files + 100)), 413, "body_too_large")


def test_a_wrong_field_of_an_upload_is_named(subtests: pytest.Subtests, client: Client) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"surprise": "1"}, "form.surprise"),
        ({"caption": "nul \0"}, "form.caption"),
        ({"caption": "x" * 2001}, "form.caption"),
        ({"caption": ["one", "two"]}, "form.caption"),
        ({"tags": ",".join(str(i) for i in range(33))}, "form.tags"),
        ({"tags": "x" * 65}, "form.tags.0"),
        ({"attributes": "not json"}, "form.attributes"),
        ({"attributes": "[]"}, "form.attributes"),
        ({"attributes": '{"a": 1}'}, "form.attributes.a"),
        ({"attributes": '{"a": "\\u0000"}'}, "form.attributes.a"),
        ({"attributes": '{"a": "\\ud800"}'}, "form.attributes"),
        ({"collection": "Not A Name"}, "form.collection"),
        ({"collection": ""}, "form.collection"),
        ({"photo": (io.BytesIO(b"x"), "x.png")}, "form.photo"),
    ]
    for fields, field in wrong:
        with subtests.test(fields=fields, field=field):
            assert wrong_fields(upload(client, picture(), **fields)) == [field]


def test_a_file_sent_as_a_text_field_is_refused(client: Client) -> None:
    answer = client.post(f"{API}/upload", data={"file": "/etc/passwd"}, content_type="multipart/form-data")
    assert wrong_fields(answer) == ["form.file"]


def test_an_upload_that_is_not_multipart_is_refused(subtests: pytest.Subtests, client: Client) -> None:
    for content_type in ["application/json", "image/png", "multipart/mixed; boundary=x", ""]:
        with subtests.test(content_type=content_type):
            answer = client.post(f"{API}/upload", data=picture(), content_type=content_type)
            problem(answer, 415, "unsupported_media_type")


def test_a_broken_multipart_body_is_refused(subtests: pytest.Subtests, client: Client) -> None:
    for case, body in {
        "cut": b"--x\r\nContent-Disposition: form-data; name=",
        "nonsense": b"nonsense",
        "empty": b"\r\n",
    }.items():
        with subtests.test(case=case):
            for content_type in ("multipart/form-data; boundary=x", "multipart/form-data"):
                answer = client.post(f"{API}/upload", data=body, content_type=content_type)
                problem(answer, 400, "malformed_body")


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"prompt": ""}, "body.prompt", "Must have at least 1 character"),
        ({"prompt": "x" * 2001}, "body.prompt", "Must have at most 2000 characters"),
        ({}, "body.prompt", "Must be given."),
        ({"prompt": "a cat", "promt": "a dog"}, "body.promt", "There is no such field."),
    ],
)
def test_the_message_about_a_field_is_in_plain_words(
    client: Client, body: dict[str, str], field: str, message: str
) -> None:
    answer = client.post(f"{API}/generate", json=body)
    assert [(each["field"], each["message"]) for each in answer.json["errors"]] == [(field, message)]


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "generate"), ("POST", "rag/generate"), ("POST", "search"), ("GET", "models")]
)
def test_a_query_of_a_route_that_has_none_is_refused(client: Client, method: str, path: str) -> None:
    answer = client.open(f"{API}/{path}?dry_run=true", method=method, json={"prompt": "a cat", "query": "a cat"})
    assert answer.status_code == 422
    assert [each["field"] for each in answer.json["errors"]] == ["query.dry_run"]
