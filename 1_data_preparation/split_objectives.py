"""Turn raw rows into preference pairs of each objective, and split them by prompt.

    python 1_data_preparation/split_objectives.py --config configs/reward_model_config.yaml

Reads   data/raw/<source>/
Writes  data/processed/<approach>/<objective>/{train,val,test,judge}.jsonl, stats.json, quarantine.jsonl;
        outputs/visualizations/<approach>/ (sizes, lengths, examples)
Code    prmd/data/prepare.py, prmd/data/splits.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run uninstalled, from any folder

from utils import run_stage

if __name__ == "__main__":
    run_stage("prmd.data.prepare:split_objectives", description=__doc__)
