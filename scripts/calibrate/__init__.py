"""Measure the thresholds of the relevance gate on a collection and its captions."""
