"""Speed and memory beside TRL, measured in pairs; its entry point is `benchmarks/speed.py`."""
