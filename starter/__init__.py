"""The starter: a small corpus and small models, trained from scratch, that make a fresh machine work offline."""
