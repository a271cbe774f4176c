"""Settings of what is drawn: the content policy, and the credentials that outputs carry."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.settings.section import Advanced, Section

SAFETY_CHECKER = "safety_checker"
"""Concept name in the decisions of the safety checker that a model brings."""


class PromptRule(Section):
    threshold: Advanced[float] = Field(
        ge=-1, le=1, description="lowest cosine between two texts at which the concept is recognised"
    )
    action: Advanced[Literal["flag", "block"]] = Field("flag", description="`block`: the job fails before drawing")


class OutputRule(Section):
    threshold: Advanced[float] = Field(
        ge=-1,
        le=1,
        description="lowest cosine between image and text at which the concept is recognised; "
        "such cosines are lower than those between two texts",
    )
    action: Advanced[Literal["flag", "blur", "block"]] = Field(
        "flag",
        description="`blur`: the stored image shows a few areas of colour; `block`: the image is not stored",
    )


ConceptText = Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S")]


class ConceptSettings(Section):
    """A concept that the content policy looks for in prompts or outputs."""

    name: Advanced[str] = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$", description="name of the concept in decisions, metrics and logs"
    )
    texts: Advanced[list[ConceptText]] = Field(
        min_length=1,
        max_length=64,
        description="short descriptions of the concept; each is embedded, and the nearest one counts",
    )
    unless: Advanced[list[ConceptText]] = Field(
        default_factory=list,
        max_length=64,
        description="descriptions of harmless things; a prompt or image part nearer to one of these does not count",
    )
    prompt: Advanced[PromptRule | None] = Field(None, description="rule for prompts; unset: prompts are not checked")
    output: Advanced[OutputRule | None] = Field(None, description="rule for outputs; unset: outputs are not checked")

    @model_validator(mode="after")
    def _a_rule_is_given(self) -> Self:
        if self.prompt is None and self.output is None:
            raise ValueError("prompt or output is required")
        return self


class SafetySettings(Section):
    concepts: Advanced[list[ConceptSettings]] = Field(
        default_factory=list,
        max_length=64,
        description="concepts that the content policy looks for; empty: only the models' own safety checkers judge",
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [concept.name for concept in self.concepts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"concepts has a name twice: {', '.join(twice)}")
        if SAFETY_CHECKER in names:
            raise ValueError(f"concepts cannot have the name {SAFETY_CHECKER}: it means the models' own checker")
        return self


class ContentCredentialsSettings(Section):
    """Signed manifests inside the outputs, by the standard C2PA (https://c2pa.org)."""

    enabled: Advanced[bool] = Field(
        False, description="sign every output; needs the extra `c2pa`; a job whose output cannot be signed fails"
    )
    certificate_chain: Advanced[Path | None] = Field(
        None, description="PEM file: the certificate of the signer, then those of its issuers"
    )
    private_key: Advanced[Path | None] = Field(None, description="PEM file (PKCS #8) with the key of this certificate")
    algorithm: Advanced[Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"]] = Field(
        "es256", description="algorithm that fits the key"
    )
    timestamp_url: Advanced[str | None] = Field(
        None,
        pattern=r"^https?://",
        description="RFC 3161 service that dates signatures, so that they outlive the certificate; unset: no network",
    )
    timestamp_wait_s: Advanced[float] = Field(
        5.0, gt=0, le=30, description="longest wait for a time stamp; after it, the output is signed without one"
    )
    include_prompt: Advanced[bool] = Field(
        True,
        description="false: no file names the prompt, neither in its manifest nor in its own record; "
        "the database keeps it",
    )

    @model_validator(mode="after")
    def _a_signer_has_its_files(self) -> Self:
        if self.enabled and (self.certificate_chain is None or self.private_key is None):
            raise ValueError("certificate_chain and private_key are required with enabled")
        return self
