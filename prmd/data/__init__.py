"""Stage 1: preference data, one module a source, from the hub or local files to leak-free splits by objective."""
