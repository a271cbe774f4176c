"""Does retrieval help? The same prompts from the same seeds, drawn with and without memories and judged."""
