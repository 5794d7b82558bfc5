"""Run the benchmarks on the reference and every policy.

    python 4_evaluation/benchmark_eval.py --config configs/evaluation_config.yaml

Reads   data/processed/<approach>/, models/policy_models/<approach>/
Writes  outputs/benchmarks/<name>/<approach>/<method>.json, outputs/report/index.html
Code    prmd/evaluation/evaluate.py, prmd/benchmarks/run.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run uninstalled, from any folder

from utils import run_stage

if __name__ == "__main__":
    run_stage("prmd.evaluation.evaluate:benchmark_eval", description=__doc__)
