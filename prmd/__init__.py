"""Pessimistic reward model distillation: the library behind the numbered scripts.

Rooms, each importing only those before it: errors, objectives, features; pessimism, statistics; runtime; artifacts; config; pairs;
report; models; data, training, inference; rewards; policies, judges, publishing; benchmarks; evaluation; setup_check;
model_check.

Read five files first, in this order: `pairs.py` (a preference pair), `pessimism/aggregation.py` (R(x, y) of all members),
`policies/targets.py` (what a method is trained towards), `pessimism/losses.py` (the equations of margins and losses),
`training/trainer.py` (how).
"""

import os
import warnings

# Read when the Hugging Face libraries are imported, and by every worker process: no telemetry, no forked tokenizers.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Where numpy is missing, one line says so; torch, which works without, need not say it as well.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
