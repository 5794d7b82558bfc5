"""Train the honesty reward model r_honest(x, y).

    python 2_reward_modeling/train_honest_rm.py --config configs/reward_model_config.yaml

Reads   data/processed/<approach>/honest/{train,val,test}.jsonl
Writes  models/reward_models/<approach>/honest_rm/, outputs/reward_analysis/<approach>/honest*
Code    prmd/rewards/train.py, prmd/rewards/heads.py (the ensemble)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run uninstalled, from any folder

from utils import run_stage

if __name__ == "__main__":
    run_stage("prmd.rewards.train:train_reward_model", description=__doc__, objective="honest")
