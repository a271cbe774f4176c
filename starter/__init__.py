"""The starter: a small corpus and small models, trained from scratch, with which a new installation works offline."""
