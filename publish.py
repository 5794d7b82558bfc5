"""Publish a finished reward model, policy or judge with everything a stranger needs and nothing else.

    python publish.py models/reward_models/hh_truthfulqa/helpful_rm --folder helpful_rm
    python publish.py models/policy_models/hh_truthfulqa/cvar --to me/cvar

The hub is written by your own login (`hf auth login`). What is unfinished, or was changed since, is refused.
"""

import argparse
from pathlib import Path

from utils import forgive_console, user_errors_exit


def main() -> None:
    """Read the command line and publish."""
    forgive_console()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="folder of the finished model")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--to", metavar="HUB_ID", help="repository of the hub, made where it is missing")
    place.add_argument(
        "--folder", type=Path, metavar="PATH", help="a new or empty folder, instead of the hub"
    )
    parser.add_argument("--license", metavar="ID", help="license of your own pairs (data.approach own_pairs)")
    options = parser.parse_args()
    with user_errors_exit():
        from prmd.artifacts.paths import resolve_user_path
        from prmd.publishing.publish import publish_model

        artifact = resolve_user_path(options.artifact, "ARTIFACT", "the folder of a finished model", "folder")
        where = publish_model(artifact, hub_id=options.to, folder=options.folder, license_=options.license)
        print(f"published: {where}")


if __name__ == "__main__":
    main()
