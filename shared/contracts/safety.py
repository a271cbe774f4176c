"""The operator's content policy and its decisions."""

from enum import StrEnum

from pydantic import Field

from shared.contracts.common import Contract, Name


class SafetyStage(StrEnum):
    PROMPT = "prompt"
    OUTPUT = "output"


class SafetyAction(StrEnum):
    """The consequence of a recognised concept, the mildest first."""

    FLAG = "flag"
    BLUR = "blur"
    BLOCK = "block"


class SafetyDecision(Contract):
    """One recognised concept and its consequence."""

    concept: str = Field(
        description="name of a concept of the policy, or `safety_checker` for the model's own checker",
        examples=["weapon"],
    )
    stage: SafetyStage
    action: SafetyAction
    index: int | None = Field(None, description="index of the image in the job; `null` for the prompt", examples=[1])
    similarity: float | None = Field(
        None, description="cosine to the concept; `null` for a checker that gives no number", examples=[0.31]
    )
    threshold: float | None = Field(
        None, description="lowest similarity at which the concept is recognised", examples=[0.28]
    )


class SafetyRecord(Contract):
    """The judgement of a policy. Without decisions, the policy recognised no concept."""

    policy: str = Field(description="digest of the policy; it changes when a rule changes")
    decisions: list[SafetyDecision] = Field(default_factory=list)


class ConceptView(Contract):
    """A concept of the policy and its actions. `null`: prompts, or outputs, are not checked for it."""

    name: Name = Field(examples=["weapon"])
    prompt: SafetyAction | None
    output: SafetyAction | None


class PolicyView(Contract):
    concepts: list[ConceptView]
