"""Distill a pessimistic reward R into a policy, for each of policy.methods.

    python 3_policy_training/pessimistic_dpo.py --config configs/policy_config.yaml

Delta* = clip(reward_scale [R(x, y_w) - R(x, y_l)], +-margin_clip),  L = (Delta* - Delta_theta)^2;  hard_min: R = min_km r_km

Reads   data/processed/<approach>/*/{train,val}.jsonl, models/reward_models/<approach>/
Writes  data/cache/ (rewards, reference log-probabilities), models/policy_models/<approach>/<method>/
Code    prmd/pessimism/aggregation.py (R), prmd/policies/targets.py (Delta*, L), prmd/pessimism/losses.py (their equations);
        run by prmd/policies/train.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run uninstalled, from any folder

from utils import run_stage

if __name__ == "__main__":
    run_stage("prmd.policies.train:train_pessimistic", description=__doc__)
