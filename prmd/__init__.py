"""Pessimistic reward-model distillation: the library behind the numbered scripts.

Layers, each importing only the ones to its right: stages (data_preparation, reward_modeling, policy_training,
evaluation) -> parts (preferences ... benchmarks) -> foundations (config ... provenance) and maths (losses ... kl).
Start reading at `rewards.train.train_reward_model` or `policies.train.train_pessimistic`.
"""

import os

# Read when the Hugging Face libraries are imported, and by every worker process: no telemetry, no forked tokenizers.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
