"""Which sources an approach is made of, and which files each of them gives."""

from collections import Counter

from prmd.config.shared import DataConfig
from prmd.data.embedded import plan_embedded
from prmd.data.hh_rlhf import plan_hh_rlhf
from prmd.data.own.files import plan_own
from prmd.data.pku_safe_rlhf import plan_pku
from prmd.data.readers import SourceFile
from prmd.data.truthfulqa import plan_truthfulqa
from prmd.errors import ConfigError


def required_sources(data: DataConfig) -> tuple[str, ...]:
    """The sources an approach is made of."""
    if data.approach == "hh_truthfulqa":
        return ("hh_rlhf", "truthfulqa")
    if data.approach == "pku_safe":
        needs_truthfulqa = data.pku_safe_rlhf.honest == "truthfulqa"
        return ("pku_safe_rlhf", "truthfulqa") if needs_truthfulqa else ("pku_safe_rlhf",)
    return (data.approach,)  # `embedded`, `own_pairs`


def plan_source(source: str, data: DataConfig) -> list[SourceFile]:
    """List the files of one source; nothing is fetched before a file's `read` is used.

    Raises:
        ConfigError: the local path does not exist or does not have the hub's layout; names the YAML key.
    """
    planners = {
        "hh_rlhf": plan_hh_rlhf,
        "truthfulqa": plan_truthfulqa,
        "pku_safe_rlhf": plan_pku,
        "embedded": plan_embedded,
        "own_pairs": plan_own,
    }
    files = planners[source](data)
    if repeated := sorted(name for name, n in Counter(file.name for file in files).items() if n > 1):
        raise ConfigError(
            f"data.{source}.path: two files would both become {repeated[0]}; rename or remove one"
        )
    return files
