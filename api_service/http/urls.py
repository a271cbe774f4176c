"""Paths of the API."""

API = "/api/v1"
"""Prefix of all paths of the API. Probes at the root, Studio, Swagger UI and metrics have none."""
