"""The names of the faults inside a worker, and of its notes.

This module imports no torch, so the process that plans the faults need not load it.
"""

# Orders: the next worker at that point carries the order out. It writes a note of that name if this ends it.
MID_BATCH = "kill-in-the-middle-of-a-batch"
BEFORE_COMMIT = "kill-between-blobs-and-commit"
AFTER_COMMIT = "kill-between-commit-and-acknowledgement"
HANG = "hang"
OUT_OF_MEMORY = "batch-out-of-memory"
WRONG_COUNT = "one-image-too-few"

# Words in a prompt: they affect that job in every worker.
POISON = "poison"
TOO_LARGE = "toolarge"
GARBAGE = "garbage"

# A note that a worker writes for every generated image.
GENERATED = "generated"

THIEF = "thief"
"""The worker name of a process that claims the jobs of others and does not exist."""
