"""Train the baseline: standard DPO on the pooled labels, with TRL's own trainer.

    python 3_policy_training/baseline_dpo.py --config configs/policy_config.yaml

L = -log sigma(beta * [rho(x, y_w) - rho(x, y_l)]), rho the log-ratio of policy and reference (Eq. 7 of arXiv:2305.18290)

Reads   data/processed/<approach>/*/{train,val}.jsonl
Writes  models/policy_models/<approach>/baseline_dpo/
Code    prmd/policies/trl_baseline.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run uninstalled, from any folder

from utils import run_stage

if __name__ == "__main__":
    run_stage("prmd.policies.train:train_baseline_dpo", description=__doc__)
