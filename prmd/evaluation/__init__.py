"""Stage 4: every policy beside the reference on the same prompts, by the same judges."""
