"""Download the sources of the approach, at pinned revisions.

    python 1_data_preparation/download_dataset.py --config configs/reward_model_config.yaml

Reads   the hub ids or local folders data.<source>.path; 1_data_preparation/embedded/ for data.approach: embedded
Writes  data/raw/<source>/*.jsonl, manifest.json (revision, rows, sha256)
Code    prmd/data/prepare.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts run uninstalled, from any folder

from utils import run_stage

if __name__ == "__main__":
    run_stage("prmd.data.prepare:download_dataset", description=__doc__)
