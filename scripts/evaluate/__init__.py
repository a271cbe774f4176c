"""Does retrieval help? Generate the same prompts with the same seeds, with and without references, and judge them."""
