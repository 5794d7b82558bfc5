"""Compare every policy with the reference: win rates, worst objective, rewards, KL, length.

    python 4_evaluation/compute_metrics.py --config configs/evaluation_config.yaml

Reads   data/processed/<approach>/*/{val,test,judge}.jsonl, models/reward_models/<approach>/, models/policy_models/<approach>/
Writes  models/judges/<approach>/<objective>/, outputs/metrics/<approach>/, outputs/report/index.html
Code    prmd/evaluation/evaluate.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run uninstalled, from any folder

from utils import run_stage

if __name__ == "__main__":
    run_stage("prmd.evaluation.evaluate:compute_metrics", description=__doc__)
