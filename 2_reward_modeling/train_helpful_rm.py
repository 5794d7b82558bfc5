"""Train the helpfulness reward model r_helpful(x, y).

    python 2_reward_modeling/train_helpful_rm.py --config configs/reward_model_config.yaml

Reads   data/processed/<approach>/helpful/{train,val,test}.jsonl
Writes  models/reward_models/<approach>/helpful_rm/, outputs/reward_analysis/<approach>/helpful*
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run uninstalled, from any folder

from prmd.rewards.train import train_reward_model
from utils import run_stage

if __name__ == "__main__":
    run_stage(train_reward_model, description=__doc__, objective="helpful")
