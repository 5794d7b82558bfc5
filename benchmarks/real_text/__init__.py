"""The study on real text with a known bias; its entry point is `benchmarks/real_text.py`."""
