"""Distill a pessimistic reward R into a policy, for each of policy.methods.

    python 3_policy_training/pessimistic_dpo.py --config configs/policy_config.yaml

Δ* = clip(reward_scale·[R(x,y_w) − R(x,y_l)], ±margin_clip),  L = (Δ* − Δ_θ)²;  hard_min: R = min_k,m r_k,m

Reads   data/processed/<approach>/*/{train,val}.jsonl, models/reward_models/<approach>/
Writes  data/cache/ (rewards, reference log-probabilities), models/policy_models/<approach>/<method>/
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run uninstalled, from any folder

from prmd.policies.train import train_pessimistic
from utils import run_stage

if __name__ == "__main__":
    run_stage(train_pessimistic, description=__doc__)
