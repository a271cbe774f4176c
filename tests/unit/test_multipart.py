"""A multipart body is read as strictly as JSON: a client's text is kept as it is, or refused."""

import io
import json

import pytest
from werkzeug.test import EnvironBuilder

from api_service.http import multipart
from shared.errors import MalformedBodyError

TYPE = "multipart/form-data; boundary=x"


def part(name: str, body: bytes, *, more: bytes = b"") -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="' + name.encode() + b'"' + more + b"\r\n\r\n" + body + b"\r\n"


def sent(body: bytes, content_type: str = TYPE) -> multipart.StrictRequest:
    stream, length = io.BytesIO(body), len(body)
    builder = EnvironBuilder(method="POST", input_stream=stream, content_length=length, content_type=content_type)
    return multipart.StrictRequest(builder.get_environ())


END = b"--x--\r\n"
FILE = part("file", bytes(range(256)), more=b'; filename="\xc3\xa9.png"')


def test_texts_and_files_are_kept_as_they_are() -> None:
    latin = b"\r\nContent-Type: text/plain; charset=iso-8859-1"
    body = part("caption", "é\ufffd猫".encode()) + part("source", "é".encode("latin-1"), more=latin) + FILE + END
    request = sent(body)
    (file,) = multipart.uploaded_files(request)
    assert (file.name, file.data) == ("é.png", bytes(range(256)))
    fields = multipart.upload_fields(request)
    assert (fields.caption, fields.source) == ("é\ufffd猫", "é")
    request.close()


@pytest.mark.parametrize(
    ("body", "content_type", "reason"),
    [
        (part("caption", b"caf\xe9") + FILE + END, TYPE, "caption.*UTF-8"),
        (part("caption", b"\xff", more=b"\r\nContent-Type: text/plain; charset=ascii") + END, TYPE, "caption.*ASCII"),
        (part("file", b"1", more=b'; filename="\xe9.png"') + END, TYPE, "UTF-8"),
        (b"--x\r\nContent-Type: image/png\r\n\r\n1\r\n" + END, TYPE, "Content-Disposition"),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n" + END, TYPE, "name"),
        (FILE + END, "multipart/form-data", "boundary"),
        (FILE + END, "multipart/form-data; boundary=\xe9", "boundary"),
        (FILE + END, "multipart/form-data; boundary=other", "end"),
        (FILE, TYPE, "end"),
        (FILE[:40], TYPE, "end"),
        (b"", TYPE, "end"),
    ],
)
def test_a_body_that_cannot_be_read_is_malformed_with_its_reason(body: bytes, content_type: str, reason: str) -> None:
    with pytest.raises(MalformedBodyError, match=reason):
        multipart.uploaded_files(sent(body, content_type))


def test_a_json_field_that_is_not_utf_8_is_malformed() -> None:
    body = part("request", json.dumps({"prompt": "café"}, ensure_ascii=False).encode("latin-1")) + END
    with pytest.raises(MalformedBodyError, match=r"request.*UTF-8"):
        multipart.rag_generate_request(sent(body))


def test_a_form_of_a_page_is_read_as_before() -> None:
    request = sent(b"prompt=caf%C3%A9&k=1", "application/x-www-form-urlencoded")
    assert request.form.to_dict() == {"prompt": "café", "k": "1"}
