"""What the operator's content policy decided, and what it is."""

from enum import StrEnum

from pydantic import Field

from shared.contracts.common import Contract, Name


class SafetyStage(StrEnum):
    PROMPT = "prompt"
    OUTPUT = "output"


class SafetyAction(StrEnum):
    """What follows from a concept that was recognised, the mildest first."""

    FLAG = "flag"
    BLUR = "blur"
    BLOCK = "block"


class SafetyDecision(Contract):
    """One concept that was recognised, and what followed."""

    concept: str = Field(
        description="a name of the policy, or `safety_checker`: the checker that came with the model",
        examples=["weapon"],
    )
    stage: SafetyStage
    action: SafetyAction
    index: int | None = Field(None, description="which of the job's images; none for the prompt", examples=[1])
    similarity: float | None = Field(
        None, description="cosine to the concept; none from a checker that gives only a yes", examples=[0.31]
    )
    threshold: float | None = Field(None, description="from which similarity on the concept counts", examples=[0.28])


class SafetyRecord(Contract):
    """What a policy has judged. Without decisions it found nothing."""

    policy: str = Field(description="digest of the policy: equal as long as it judges by the same rules")
    decisions: list[SafetyDecision] = Field(default_factory=list)


class ConceptView(Contract):
    """A concept of the policy, and what follows where it is recognised; none: it is not looked for there."""

    name: Name = Field(examples=["weapon"])
    prompt: SafetyAction | None
    output: SafetyAction | None


class PolicyView(Contract):
    concepts: list[ConceptView]
