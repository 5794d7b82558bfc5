"""Train the reward model r_k(x, y) of any objective, which the command names: objective=polite.

    python 2_reward_modeling/train_rm.py --config configs/own_pairs objective=polite

Reads   data/processed/<approach>/<objective>/{train,val,test}.jsonl
Writes  models/reward_models/<approach>/<objective>_rm/, outputs/reward_analysis/<approach>/<objective>*
Code    prmd/rewards/train.py, prmd/rewards/heads.py (the ensemble)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run uninstalled, from any folder

from utils import run_stage

if __name__ == "__main__":
    run_stage("prmd.rewards.train:train_reward_model", description=__doc__, objective=None)
