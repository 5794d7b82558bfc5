"""Train the harmlessness reward model r_harmless(x, y).

    python 2_reward_modeling/train_harmless_rm.py --config configs/reward_model_config.yaml

Reads   data/processed/<approach>/harmless/{train,val,test}.jsonl
Writes  models/reward_models/<approach>/harmless_rm/, outputs/reward_analysis/<approach>/harmless*
Code    prmd/rewards/train.py, prmd/rewards/heads.py (the ensemble)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run uninstalled, from any folder

from utils import run_stage

if __name__ == "__main__":
    run_stage("prmd.rewards.train:train_reward_model", description=__doc__, objective="harmless")
