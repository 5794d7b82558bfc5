"""What `benchmarks/full_size.py` runs on, watches and writes."""
