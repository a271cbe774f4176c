"""Folders, tables and tars give every file, or the reason why it is skipped, in bounded memory."""

import io
import json
import lzma
import random
import re
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from afterimage_client import Afterimage
from scripts.index_images import sources, upload
from scripts.index_images.__main__ import DESCRIPTION
from scripts.index_images.report import Report
from scripts.index_images.sources import Sample, SkippedFileError, SourceError, read_source
from scripts.index_images.upload import Uploader
from shared.errors import UnsupportedImageTypeError
from shared.imaging import UPLOAD_FORMATS

MIB = 2**20


def read_all(source: Path, **options: int) -> dict[str, object]:
    """Return the caption of each image, or the code why it is skipped, by name."""
    found: dict[str, object] = {}
    for file in read_source(source, **options):  # type: ignore[arg-type]
        assert file.name not in found, "each name is unique"
        try:
            found[file.name] = file.read().fields.get("caption")
        except SkippedFileError as error:
            found[file.name] = error.code
    return found


def make_tar(path: Path, members: list[tuple[str, bytes]], *, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def make_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_every_format_that_the_service_accepts_is_read_and_named(tmp_path: Path) -> None:
    suffixes = Image.registered_extensions()
    assert {suffixes[suffix] for suffix in sources.IMAGE_SUFFIXES} == set(UPLOAD_FORMATS)
    folder = make_folder(tmp_path, {f"a{suffix}": b"image" for suffix in sources.IMAGE_SUFFIXES})
    assert read_all(folder) == {f"a{suffix}": None for suffix in sources.IMAGE_SUFFIXES}
    for suffix in sources.IMAGE_SUFFIXES:
        assert suffix in DESCRIPTION, "of --help"


def test_texts_and_forms_name_every_format_that_the_service_accepts() -> None:
    pages = Path("api_service/studio/templates/studio")
    accepted = set(re.findall(r'accept="([^"]*)"', "".join(page.read_text() for page in pages.glob("*.html"))))
    images = [set(types.split(",")) for types in accepted if "image/" in types]
    assert images == [{Image.MIME[name] for name in UPLOAD_FORMATS}]
    for name in UPLOAD_FORMATS:
        assert name in UnsupportedImageTypeError().message.upper()


# --- tars ---------------------------------------------------------------------------------------------------------


def test_images_of_a_tar_that_share_a_name_up_to_the_suffix_are_all_read(tmp_path: Path) -> None:
    members = [
        ("0001.jpg", b"jpeg"),
        ("0001.png", b"png"),
        ("0001.txt", b"both"),
        ("0002.png", b"x"),
        ("0002.png", b"y"),
    ]
    files = list(read_source(make_tar(tmp_path / "a.tar", members)))
    assert [(file.read().data, file.read().fields) for file in files] == [
        (b"jpeg", {"caption": "both"}),
        (b"png", {"caption": "both"}),
        (b"x", {}),
        (b"y", {}),
    ]
    assert [file.name for file in files] == ["0001.jpg", "0001.png", "0002.png", "0002.png (2)"]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_sidecar_may_stand_anywhere_in_a_tar(tmp_path: Path, mode: str) -> None:
    members = [
        ("b.TXT", b"b"),
        ("./a.PNG", b"1"),
        ("b.png", b"2"),
        ("c.webp", b"3"),
        ("a.txt", b"a\r\nb"),
        ("c.json", b'{"caption": "c\\r\\nd"}'),
        ("c.txt", b"unused"),
        ("lonely.txt", b"of no image"),
    ]
    assert read_all(make_tar(tmp_path / "a.tar", members, mode=mode)) == {
        "./a.PNG": "a\nb",
        "b.png": "b",
        "c.webp": "c\nd",
        "lonely.txt": "not_an_image",
    }


def test_members_of_a_tar_that_are_no_regular_files_are_named(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [("a.png", b"1"), ("notes", b"2")])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("hard.png", tarfile.LNKTYPE), ("soft.png", tarfile.SYMTYPE), ("folder", tarfile.DIRTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "a.png"
            tar.addfile(entry)
    expected = {"a.png": None, "notes": "not_an_image", "hard.png": "not_an_image", "soft.png": "not_an_image"}
    assert read_all(path) == expected


def test_a_tar_that_is_damaged_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [("a.png", b"1"), ("b.png", b"2"), ("c.png", b"3")])
    data = bytearray(path.read_bytes())
    data[1024:1100] = b"\xff" * 76
    path.write_bytes(data)
    with pytest.raises(SourceError, match="damaged"):
        read_all(path)


@pytest.mark.parametrize(
    ("name", "code"), [("a.png", "image_too_large"), ("a.txt", "sidecar_unreadable"), ("a.bin", "not_an_image")]
)
def test_a_small_tar_with_huge_members_is_read_in_little_memory(tmp_path: Path, name: str, code: str) -> None:
    path = tmp_path / "a.tar.xz"
    with lzma.open(path, "wb", preset=0) as file:
        entry = tarfile.TarInfo(name)
        entry.size = 96 * MIB
        file.write(entry.tobuf())
        for _ in range(96):
            file.write(bytes(MIB))
        image = tarfile.TarInfo("a.png" if name != "a.png" else "b.png")
        file.write(image.tobuf() + bytes(1024))
    assert path.stat().st_size < MIB
    found, peak = peak_of(lambda: read_all(path))
    assert code in found.values()
    assert peak < 40 * MIB


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_whose_header_is_huge_is_refused_in_little_memory(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar.xz"
    with lzma.open(path, "wb", preset=0) as file:
        entry = tarfile.TarInfo("header")
        entry.type, entry.size = kind, 64 * MIB
        file.write(entry.tobuf())
        for _ in range(64):
            file.write(bytes(MIB))

    def read() -> None:
        with pytest.raises(SourceError, match="header"):
            read_all(path)

    _, peak = peak_of(read)
    assert peak < 40 * MIB


def test_an_xz_dictionary_that_needs_much_memory_is_refused(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "plain.tar", [("a.png", b"1")])
    # The encoder would allocate the dictionary, so a small one is encoded and its size is changed in the header.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 4 * MIB}]
    data = bytearray(lzma.compress(path.read_bytes(), filters=filters))
    header_size = (data[12] + 1) * 4
    at = data.index(b"\x21\x01", 12) + 2
    data[at] = 36  # 1 GiB
    data[12 + header_size - 4 : 12 + header_size] = zlib.crc32(data[12 : 12 + header_size - 4]).to_bytes(4, "little")
    (tmp_path / "a.tar.xz").write_bytes(data)
    with pytest.raises(SourceError, match=r"[Mm]emory"):
        read_all(tmp_path / "a.tar.xz")


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("in_one_stream", [True, False])
def test_the_memory_limit_of_xz_holds_for_each_block(tmp_path: Path, is_first: bool, in_one_stream: bool) -> None:
    path = make_tar(tmp_path / "plain.tar", [("a.png", b"1"), ("b.png", b"2")])
    head, tail = path.read_bytes()[:1024], path.read_bytes()[1024:]
    small, large = xz_of(head if not is_first else tail), xz_with_dictionary_of_1_gib(tail if not is_first else head)
    parts = [large, small] if is_first else [small, large]
    if in_one_stream:  # the blocks of both, with the index and the end of the second stream
        parts = [parts[0][: xz_block_end(parts[0])], parts[1][12:]]
    (tmp_path / "a.tar.xz").write_bytes(b"".join(parts))
    with pytest.raises(SourceError, match="Memory usage limit"):
        read_all(tmp_path / "a.tar.xz")


def xz_of(data: bytes) -> bytes:
    return lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 4 * MIB}])


def xz_block_end(data: bytes) -> int:
    """Where the index of a stream with one block begins. https://tukaani.org/xz/xz-file-format.txt"""
    return len(data) - 12 - (int.from_bytes(data[-8:-4], "little") + 1) * 4


def xz_with_dictionary_of_1_gib(content: bytes) -> bytes:
    # The encoder would allocate the dictionary, so a small one is encoded and its size is changed in the header.
    data = bytearray(xz_of(content))
    header_size = (data[12] + 1) * 4
    data[data.index(b"\x21\x01", 12) + 2] = 36  # 1 GiB
    data[12 + header_size - 4 : 12 + header_size] = zlib.crc32(data[12 : 12 + header_size - 4]).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("padding", [0, 4, 8192])
def test_a_tar_in_several_xz_streams_is_read(tmp_path: Path, padding: int) -> None:
    data = make_tar(tmp_path / "plain.tar", [("a.png", b"1"), ("b.png", bytes(300_000))]).read_bytes()
    streams = [lzma.compress(data[start : start + 100_000]) for start in range(0, len(data), 100_000)]
    (tmp_path / "a.tar.xz").write_bytes(bytes(padding).join(streams) + bytes(padding))
    first, second = (file.read() for file in read_source(tmp_path / "a.tar.xz"))
    assert (first.data, second.data) == (b"1", bytes(300_000))


def test_a_cut_xz_is_an_error(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar.xz", [("a.png", random.Random(0).randbytes(100_000))], mode="w:xz")
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(SourceError):
        read_all(path)


@pytest.mark.parametrize(
    ("name", "shown"),
    [(".", {"."}), ("", {"(no name)"}), ("/", {"/"}), ("..", set()), ("a/.", {"a/."})],
)
def test_a_member_of_a_tar_without_a_name_is_named_and_the_others_are_read(
    tmp_path: Path, name: str, shown: set[str]
) -> None:
    read = read_all(make_tar(tmp_path / "a.tar", [("a.png", b"1"), (name, b"x"), ("b.png", b"2")]))
    assert read == {"a.png": None, "b.png": None} | dict.fromkeys(shown, "not_an_image")


def test_images_waiting_for_an_upload_hold_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "BYTES_PER_REQUEST", MIB)
    path = tmp_path / "a.tar.xz"
    with lzma.open(path, "wb", preset=0) as file:
        for number in range(32):
            entry = tarfile.TarInfo(f"{number}.png")
            entry.size = 2 * MIB
            file.write(entry.tobuf() + bytes(entry.size))
    uploader = Uploader(Afterimage("http://127.0.0.1:9"), "shared", Report(None), parallel=1)
    monkeypatch.setattr(uploader, "_upload", lambda new_images: [])
    _, peak = peak_of(lambda: list(uploader.run(read_source(path))))
    assert peak < 20 * MIB


def peak_of(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return the result of `call` and the most bytes that it held at once."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- folders and tables -------------------------------------------------------------------------------------------


def test_suffixes_in_capitals_keep_their_sidecars(tmp_path: Path) -> None:
    files = {
        "UP.PNG": b"1",
        "UP.TXT": b"upper",
        "mixed.Jpeg": b"2",
        "mixed.Json": b'{"caption": "mixed"}',
        "sub/low.png": b"3",
        "sub/low.Txt": b"low",
        "sub/other.txt": b"of no image",
        "utf16.png": b"4",
        "utf16.txt": "hello\r\nyou".encode("utf-16"),
        "latin.png": b"5",
        "latin.txt": "grün".encode("latin-1"),
    }
    make_folder(tmp_path, files)
    assert read_all(tmp_path) == {
        "UP.PNG": "upper",
        "mixed.Jpeg": "mixed",
        "sub/low.png": "low",
        "sub/other.txt": "not_an_image",
        "utf16.png": "hello\nyou",
        "latin.png": "sidecar_unreadable",
    }
    (tmp_path / "list.csv").write_text("file\nUP.PNG\nmixed.Jpeg\n")
    assert list(read_all(tmp_path / "list.csv").values()) == ["upper", "mixed"]


def test_a_changed_sidecar_in_capitals_changes_the_stamp_of_its_image(tmp_path: Path) -> None:
    make_folder(tmp_path, {"UP.PNG": b"1", "UP.TXT": b"upper"})
    (before,) = read_source(tmp_path)
    (tmp_path / "UP.TXT").write_text("changed")
    (after,) = read_source(tmp_path)
    assert before.stamp != after.stamp
    assert [path.name for path in sources.images_beside(tmp_path / "UP.TXT")] == ["UP.PNG"]


def test_a_huge_file_or_sidecar_of_a_folder_is_not_read_whole(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a.png": b"", "b.png": b"1", "b.txt": b""})
    for name in ("a.png", "b.txt"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(256 * MIB)
    found, peak = peak_of(lambda: read_all(tmp_path))
    assert found == {"a.png": "image_too_large", "b.png": "sidecar_unreadable"}
    assert peak < 40 * MIB


# --- descriptions -------------------------------------------------------------------------------------------------


def test_json_values_of_attributes_keep_their_json_form() -> None:
    attributes = {"n": 1, "f": 1.5, "none": None, "t": True, "l": [1, None], "s": "x"}
    uploader = Uploader(Afterimage("http://127.0.0.1:9"), "shared", Report(None))
    expected = {"n": "1", "f": "1.5", "t": "true", "l": "[1, null]", "s": "x"}
    for given in (attributes, json.dumps(attributes)):
        assert uploader._description(Sample("a.png", b"1", {"attributes": given})).attributes == expected
