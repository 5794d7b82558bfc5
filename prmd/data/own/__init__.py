"""The `own_pairs` approach: people's own files, their formats, and pairs of scored responses."""
