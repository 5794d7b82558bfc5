"""The controlled study with known true rewards; its entry point is `benchmarks/gold_reward.py`."""
