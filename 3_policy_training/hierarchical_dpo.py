"""Distill the worst objective's worst members, R(x, y) = min_k CVaR_alpha over m of r_km(x, y), into a policy.

    python 3_policy_training/hierarchical_dpo.py --config configs/policy_config.yaml

Delta* = clip(reward_scale [R(x, y_w) - R(x, y_l)], +-margin_clip),  L = (Delta* - Delta_theta)^2

Reads   data/processed/<approach>/*/{train,val}.jsonl, models/reward_models/<approach>/
Writes  data/cache/ (rewards, reference log-probabilities), models/policy_models/<approach>/hierarchical/
Code    prmd/pessimism/aggregation.py (R), prmd/policies/targets.py (Delta*), prmd/policies/train.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run uninstalled, from any folder

from utils import run_stage

if __name__ == "__main__":
    run_stage("prmd.policies.train:train_hierarchical", description=__doc__)
