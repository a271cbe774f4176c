"""Generators whose images are drawn by an engine elsewhere, through OpenAI's image calls."""
