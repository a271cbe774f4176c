"""Requests, responses and what services tell each other, by noun. Nothing here imports the rest of the product."""
