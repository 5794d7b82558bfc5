"""Run every stage in order, from data to report; what is finished is skipped.

    python run_pipeline.py --config configs/quickstart
    python run_pipeline.py --config configs data.approach=pku_safe

PATH is a folder with reward_model_config.yaml, policy_config.yaml and evaluation_config.yaml. An override goes to every
one of them that has its key: training.* and tuning.* to reward models and policies alike, reward_model_config.training.*
to reward models alone. An interrupted run is continued by the same command.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prmd.artifacts.paths import CONFIG_DIR, ArtifactPaths, remember_options, with_options
from prmd.objectives import OBJECTIVES
from prmd.setup_check import check_needs
from utils import config_file_of, load_stage, stage_parser, start_run_log, user_errors_exit

if TYPE_CHECKING:
    from prmd.config.loading import AnyConfig

Stage = tuple[str, str, dict[str, str]]
"""Script, the stage it runs, and what the stage is given beside its configuration."""
ADVICE = "Stopped. Mend this and give the same command again: finished stages are kept."


def stages(objectives: Sequence[str] = OBJECTIVES) -> list[Stage]:
    """The stages of an approach in order: a reward model for each of its objectives."""
    return [
        ("download_dataset", "prmd.data.prepare:download_dataset", {}),
        ("split_objectives", "prmd.data.prepare:split_objectives", {}),
        *(
            (f"train_{objective}_rm", "prmd.rewards.train:train_reward_model", {"objective": objective})
            for objective in objectives
        ),
        ("baseline_dpo", "prmd.policies.train:train_baseline_dpo", {}),
        ("pessimistic_dpo", "prmd.policies.train:train_pessimistic", {}),
        ("hierarchical_dpo", "prmd.policies.train:train_hierarchical", {}),
        ("compute_metrics", "prmd.evaluation.evaluate:compute_metrics", {}),
        ("benchmark_eval", "prmd.evaluation.evaluate:benchmark_eval", {}),
    ]


def say(line: str) -> None:
    """Print a line of the overall progress, from process 0 only; commands in it are of this run's configuration."""
    from prmd.runtime import is_main_process

    if is_main_process():
        print(with_options(line), flush=True)


def run_stages(configs: "dict[type, AnyConfig]", *, force: bool, dry_run: bool) -> dict[str, float]:
    """Run the stages in order and return the seconds that each took."""
    from prmd.config.loading import CONFIG_FILES
    from prmd.config.shared import RewardModelConfig

    seconds: dict[str, float] = {}
    beginning, todo = time.monotonic(), stages(configs[RewardModelConfig].paths.objectives)
    for number, (name, stage, arguments) in enumerate(todo, start=1):
        start = time.monotonic()
        config = configs[CONFIG_FILES[config_file_of(stage)]]
        say(f"[{number}/{len(todo)}] {name} ... ({_minutes(start - beginning)} elapsed)")
        if name == "pessimistic_dpo" and not config.policy.methods:
            say("    skipped: policy.methods is empty")
            continue
        with user_errors_exit(ADVICE):
            path = load_stage(stage)(config, force=force, dry_run=dry_run, **arguments)
        seconds[name] = round(time.monotonic() - start, 1)
        say(f"    {'would write' if dry_run else 'done:'} {path} ({_minutes(seconds[name])})")
    return seconds


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison of methods as aligned text: win rates against the reference, worst objective and KL, with intervals."""
    from prmd.report.tables import objectives_of

    objectives = objectives_of(rows)
    lines = [("method", *objectives, "worst objective", "KL (nats)")]
    for row in rows:
        estimates = [*(row["win_rate"].get(objective) for objective in objectives), row["worst"], row["kl"]]
        lines.append((row["method"], *map(_interval, estimates)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _interval(estimate: dict[str, Any] | None) -> str:
    if not estimate or estimate.get("value") is None:
        return "-"
    if estimate.get("low") is None:
        return f"{estimate['value']:.2f}"
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def conclude(paths: ArtifactPaths, seconds: dict[str, float]) -> None:
    """Say how long each stage took, how the methods compare, where the report is and, last, the verdict."""
    from prmd.artifacts.io import read_json
    from prmd.artifacts.runs import write_step_result
    from prmd.report.verdict import conclusion
    from prmd.runtime import is_main_process

    say("\nminutes per stage")
    for name, taken in seconds.items():
        say(f"  {name:<20} {taken / 60:6.1f}")
    say(f"  {'together':<20} {sum(seconds.values()) / 60:6.1f}")
    if is_main_process():
        write_step_result(paths, "run_pipeline", {"seconds": seconds})
    say("\nwin rate against the reference, 95 % interval")
    comparison = read_json(paths.metrics / "comparison.json")
    say(comparison_table(comparison["rows"]))
    for left_out in comparison.get("missing") or []:
        say(f"{left_out['method']}: not evaluated: {left_out['reason']}")
    say(f"\nreport: {paths.report}\n{conclusion(paths)}.")


def main() -> None:
    """Read the command line, load all configurations before anything runs, and run."""
    files = list(dict.fromkeys(config_file_of(stage) for _, stage, _ in stages()))
    arguments = stage_parser(__doc__ or "", CONFIG_DIR, files).parse_intermixed_args()
    with user_errors_exit():
        from prmd.config.loading import CONFIG_FILES, RewardModelConfig, load_pipeline
        from prmd.config.repeated import options_of_stages

        configs = load_pipeline(arguments.config, arguments.overrides)
        remember_options(options_of_stages(arguments.config, arguments.overrides))
        start_run_log(configs[RewardModelConfig].paths)
        if (
            arguments.dry_run or not configs[RewardModelConfig].paths.processed.is_dir()
        ):  # before any download
            for check in check_needs(configs):
                say(f"{check.name}: {check.detail}")
    seconds = run_stages(configs, force=arguments.force, dry_run=arguments.dry_run)
    if not arguments.dry_run:
        with user_errors_exit():
            conclude(configs[CONFIG_FILES[files[0]]].paths, seconds)


if __name__ == "__main__":
    main()
