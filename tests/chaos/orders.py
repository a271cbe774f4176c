"""What a worker of the chaos suite can be told; free of torch, so that whoever plans the faults need not load it."""

# Orders: whoever passes that point next obeys, and notes it under the same name where it dies of it.
MID_BATCH = "kill-in-the-middle-of-a-batch"
BEFORE_COMMIT = "kill-between-blobs-and-commit"
AFTER_COMMIT = "kill-between-commit-and-acknowledgement"
HANG = "hang"
OUT_OF_MEMORY = "batch-out-of-memory"
WRONG_COUNT = "one-image-too-few"

# Words in a prompt: they hit that job wherever it runs.
POISON = "poison"
TOO_LARGE = "toolarge"
GARBAGE = "garbage"

# What a worker notes of its own.
DRAWN = "drawn"

THIEF = "thief"
"""Who claims what others have in hand and never works: its name as a worker."""
