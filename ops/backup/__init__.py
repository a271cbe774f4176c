"""Backups of a whole installation: the database, and the blobs that its rows name."""
