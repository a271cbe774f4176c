"""Read generated images alone, without the service: what made them, and whether they were changed.

    python -m scripts.verify_image FILE...

A file of this service contains a record of how it was made. The record has the digest of the pixels, so a changed pixel
is noticed. The record is not signed. It does not prove who made the file, because anyone can write a record.

A file with Content Credentials (C2PA) is signed as a whole, so any change is noticed. The signature also proves who
signed it, if its issuer is on a list that you trust (--trust). Reading them needs c2pa-python: pip install '.[c2pa]'.

"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from scripts.console import ExitCode
from shared import content_credentials
from shared.content_credentials import Credentials
from shared.errors import ConfigurationError, InvalidImageError
from shared.imaging import open_image, pixels_sha256, read_record

EXIT_CODES = """exit codes:
  0  every file is intact
  1  a file was changed, or nothing in it can be verified
  2  a file is not a complete PNG, JPEG or WebP image, or the options are invalid"""


class Verdict(StrEnum):
    INTACT = "intact"
    CHANGED = "changed"
    UNVERIFIABLE = "not verifiable"
    UNREADABLE = "unreadable"

    @property
    def exit_code(self) -> ExitCode:
        codes = {Verdict.INTACT: ExitCode.DONE, Verdict.UNREADABLE: ExitCode.INVALID_INPUT}
        return codes.get(self, ExitCode.INCOMPLETE)


Checked = tuple[Verdict | None, str]
"""The result of one check, and a sentence about it. None: it decides nothing."""


@dataclass(frozen=True)
class Finding:
    """The result for one file."""

    file: str
    verdict: Verdict
    reasons: list[str]
    """Sentences: the results of the checks, and the limits of what they prove."""
    made_by: dict[str, Any] = field(default_factory=dict)
    """Program, model, seed, prompt and references. A value that the file does not name is missing."""
    signer: dict[str, Any] | None = None
    """Name, issuer and algorithm; None: the file is not signed, or the signature was not read."""
    failures: list[str] = field(default_factory=list)
    """Failed checks of the Content Credentials, as codes of the standard."""


def verify(file: Path, *, trust: str | None = None) -> Finding:
    """Verify one file. trust: certificates of trusted issuers, as PEM.

    Raises:
        ConfigurationError: `trust` is given, and c2pa-python is not installed or cannot read it.
    """
    try:
        data = file.read_bytes()
        pixels = pixels_sha256(open_image(data))
    except OSError as error:
        return Finding(str(file), Verdict.UNREADABLE, [f"The file cannot be read: {error.strerror}."])
    except InvalidImageError:
        return Finding(str(file), Verdict.UNREADABLE, ["The file is not a complete PNG, JPEG or WebP image."])
    reads_credentials = trust is not None or content_credentials.is_installed()
    credentials = content_credentials.read_credentials(data, trust=trust) if reads_credentials else None
    record = read_record(data)
    signature = _check_signature(data, credentials, trust=trust)
    content = _check_record(record, pixels, is_signed=credentials is not None and credentials.is_valid)
    verdicts = [verdict for verdict, _ in (signature, content) if verdict is not None]
    # A change decides, then the signature: pixels that fit an unsigned record do not outweigh a wrong signature.
    verdicts.sort(key=lambda verdict: verdict is not Verdict.CHANGED)
    manifest = {} if credentials is None else credentials.manifest
    return Finding(
        file=str(file),
        verdict=verdicts[0] if verdicts else Verdict.UNVERIFIABLE,
        reasons=[sentence for _, sentence in (signature, content)],
        made_by=_made_by(record or {}, manifest),
        signer=manifest.get("signature_info"),
        failures=[] if credentials is None else list(credentials.failures),
    )


def _check_signature(data: bytes, credentials: Credentials | None, *, trust: str | None) -> Checked:
    if credentials is None:
        if trust is not None:
            return Verdict.UNVERIFIABLE, "The file has no Content Credentials, so it has no signer to trust."
        if content_credentials.has_manifest(data) and not content_credentials.is_installed():
            install = content_credentials.INSTALL
            return (
                None,
                f"The file has Content Credentials. They were not checked, because c2pa-python is missing ({install}).",
            )
        return None, "The file has no Content Credentials."
    codes = ", ".join(credentials.failures)
    if not credentials.is_valid:
        if any("mismatch" in code.lower() for code in credentials.failures):
            return Verdict.CHANGED, f"The file is not as it was signed: {codes}."
        return Verdict.UNVERIFIABLE, f"The Content Credentials are not valid: {codes}."
    signer = credentials.manifest.get("signature_info", {})
    signed = f"The file is as it was signed by {signer.get('common_name')} ({signer.get('issuer')})."
    if credentials.is_trusted:
        return Verdict.INTACT, f"{signed} The issuer of this signer is on your list."
    if trust is not None:
        return Verdict.UNVERIFIABLE, f"{signed} But its issuer is not on your list: {codes}."
    return (
        Verdict.INTACT,
        f"{signed} Anyone can choose such a name. Only a list of trusted issuers proves it (--trust).",
    )


def _check_record(record: Mapping[str, Any] | None, pixels: str, *, is_signed: bool) -> Checked:
    if record is None:
        return None, "The file has no record of this service."
    recorded = record.get("file_pixels_sha256")
    if recorded is None:
        return None, "The record has no digest of the pixels. An earlier release wrote it."
    if recorded != pixels:
        return Verdict.CHANGED, "The pixels are not those of the record."
    unsigned = "" if is_signed else " The record is not signed, so this does not prove who made the file."
    return Verdict.INTACT, f"The pixels are those of the record.{unsigned}"


def _made_by(record: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Program, model, prompt and so on, from the record of the file, or else from its manifest."""
    model, parameters = _mapping(record, "model"), _mapping(record, "parameters")
    found = {
        "program": _program(record, manifest),
        "ai_generated": True if content_credentials.AI_GENERATED in json.dumps(manifest) else None,
        "model": model.get("name"),
        "pipeline": model.get("pipeline"),
        "weights_digest": model.get("weights_digest"),
        "seed": record.get("seed"),
        "prompt": parameters.get("prompt"),
        "negative_prompt": parameters.get("negative_prompt"),
        "mode": record.get("mode"),
        "job_id": record.get("job_id"),
        "references": list(_references(record, manifest)),
    }
    return {name: value for name, value in found.items() if value not in (None, [])}


def _program(record: Mapping[str, Any], manifest: Mapping[str, Any]) -> str | None:
    if version := _mapping(record, "versions").get("afterimage"):
        return f"Afterimage {version}"
    agents = [agent for agent in manifest.get("claim_generator_info") or [] if isinstance(agent, dict)]
    return ", ".join(f"{agent.get('name')} {agent.get('version', '')}".strip() for agent in agents) or None


def _references(record: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    names = ("caption", "image_id", "sha256", "weight", "similarity", "concepts")
    recorded = record.get("references")
    for each in recorded if isinstance(recorded, list) else []:
        if isinstance(each, dict):
            yield {name: each[name] for name in names if each.get(name) not in (None, [])}
    if recorded is None:
        for each in manifest.get("ingredients") or []:
            yield {"caption": each.get("title"), "relationship": each.get("relationship")}


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def _lines(finding: Finding) -> Iterator[str]:
    """The finding for people."""
    yield f"{finding.file}: {finding.verdict}"
    for sentence in finding.reasons:
        yield f"  {sentence}"
    for name, value in finding.made_by.items():
        if name == "references":
            for position, reference in enumerate(value, 1):
                values = ", ".join(f"{key} {part}" for key, part in reference.items() if key != "caption")
                yield f"  reference {position}: {reference.get('caption') or 'no caption'} ({values})"
        else:
            yield f"  {name.replace('_', ' ')}: {'yes' if value is True else value}"


def _printable(text: str) -> str:
    """Text without control characters: a file may come from anyone, and a terminal obeys them."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--trust", type=Path, metavar="PEM", help="certificates of issuers that you trust")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object per file")
    options = parser.parse_args(arguments)
    code = ExitCode.DONE
    try:
        trust = None if options.trust is None else options.trust.read_text()
        for file in options.files:
            finding = verify(file, trust=trust)
            code = max(code, finding.verdict.exit_code)
            if options.as_json:
                print(json.dumps(asdict(finding)))
            else:
                print("\n".join(map(_printable, _lines(finding))))
    except (ConfigurationError, OSError, UnicodeDecodeError) as error:
        parser.exit(ExitCode.INVALID_INPUT, f"error: {error}\n")
    raise SystemExit(int(code))


if __name__ == "__main__":
    main()
