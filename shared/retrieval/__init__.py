"""Retrieval: chooses the references of a generated image, with their weights and the reasons.

The API uses it to show planned references (`GET /rag/search`), and the worker to generate. So both choose the same.
"""

from shared.retrieval.candidates import Found, find_candidates
from shared.retrieval.diversity import diversify, without_near_duplicates
from shared.retrieval.gate import DEFAULT_MIN_SIMILARITY, Gate, resolve_gate
from shared.retrieval.pinned import plan_pinned
from shared.retrieval.plan import (
    OVERFETCH,
    Avoided,
    Candidate,
    ConceptImages,
    ConceptQuery,
    Plan,
    decide,
    depth,
    plan_concepts,
    search_concept,
)
from shared.retrieval.query_vector import combine

__all__ = [
    "DEFAULT_MIN_SIMILARITY",
    "OVERFETCH",
    "Avoided",
    "Candidate",
    "ConceptImages",
    "ConceptQuery",
    "Found",
    "Gate",
    "Plan",
    "combine",
    "decide",
    "depth",
    "diversify",
    "find_candidates",
    "plan_concepts",
    "plan_pinned",
    "resolve_gate",
    "search_concept",
    "without_near_duplicates",
]
