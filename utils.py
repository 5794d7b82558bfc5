"""The command line around every stage, and a check of the set-up.

    python utils.py                              check Python, packages, GPU, memory and disk; make the directories
    python utils.py --config configs/quickstart
    python utils.py model.name=FOLDER_OR_HUB_ID  check a base model by its configuration and tokenizer; with --load its weights

A numbered script calls `run_stage` with the name of its stage. What of the library, `prmd`, needs packages is imported after the
command line is parsed, so that `--help` is instant and `python utils.py` can say what is missing.
"""

import argparse
import ast
import importlib.util
import logging
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from prmd.artifacts.hub import use_project_cache
from prmd.artifacts.paths import CONFIG_DIR, ArtifactPaths, remember_options, with_options
from prmd.config.masking import masked
from prmd.errors import StoppedError, UserError, user_line
from prmd.setup_check import check_everything, missing_package, report

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130
logger = logging.getLogger("prmd.run")


def run_stage(stage: str, *, description: str, **stage_arguments: Any) -> None:
    """Read the command line and the configuration, and run a stage.

    Args:
        stage: `package.module:function`; a function of a configuration, whose kind is the annotation of `config`, with
            `force` and `dry_run`.
        description: the script's docstring, shown by `--help`.
        **stage_arguments: passed on, such as `objective="helpful"`; where it is None the command gives it, `objective=polite`.

    Raises:
        SystemExit: with status 2, after a line on stderr, for what the user can mend; other errors keep their traceback.
    """
    own_file = config_file_of(stage)
    arguments = stage_parser(description, CONFIG_DIR / own_file, [own_file]).parse_intermixed_args()
    with user_errors_exit():
        from prmd.config.loading import CONFIG_FILES, load_config, named_arguments
        from prmd.config.repeated import options_of_stages

        given, overrides = named_arguments(arguments.overrides, stage_arguments)
        config = load_config(arguments.config, kind := CONFIG_FILES[own_file], overrides)
        remember_options(options_of_stages(arguments.config, overrides, kind))
        start_run_log(config.paths)
        path = load_stage(stage)(config, force=arguments.force, dry_run=arguments.dry_run, **given)
    logger.info("%s %s", "would write" if arguments.dry_run else "result:", path)
    if own_file == "evaluation_config.yaml" and not arguments.dry_run:
        from prmd.report.verdict import conclusion

        logger.info("%s.", conclusion(config.paths))


def config_file_of(stage: str) -> str:
    """The YAML file a stage reads: `PolicyConfig`, the annotation of its `config`, is policy_config.yaml.

    The annotation is read from the source, because importing a stage takes seconds.
    """
    module, _, name = stage.partition(":")
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    function = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name)
    kind = next(a.annotation.id for a in function.args.args if a.arg == "config")
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind).lower() + ".yaml"


def load_stage(stage: str) -> Callable[..., Path]:
    """Import the function that `package.module:function` names."""
    return pkgutil.resolve_name(stage)


def start_run_log(paths: ArtifactPaths) -> None:
    """Choose the hub's cache before its client is imported, join the other processes of a distributed run, and speak."""
    use_project_cache(paths.hub_cache)
    from prmd.runtime import configure_logging, start_processes

    configure_logging(with_options)
    start_processes()


def stage_parser(description: str, default: Path, files: Sequence[str]) -> argparse.ArgumentParser:
    """The command line of every script: --config, --force, --dry-run and overrides.

    Args:
        default: the configuration that is read without --config.
        files: names of the shipped YAML files whose keys `--help` shows.
    """
    parser = config_parser(description, default)
    parser.epilog = "\n\n".join(_keys_of(CONFIG_DIR / name) for name in files)
    parser.add_argument("--force", action="store_true", help="do it again although the result is there")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be read, trained and written, and stop"
    )
    return parser


def _keys_of(path: Path) -> str:
    shown, text = path.relative_to(CONFIG_DIR.parent).as_posix(), path.read_text(encoding="utf-8").rstrip()
    return f"keys of {shown} with defaults; a nested one is given as key.sub=value:\n\n{text}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        with suppress(ImportError):  # a package may be missing
            from prmd.config.loading import CONFIG_FILES
            from prmd.config.mistakes import option_advice

            message = option_advice(message, CONFIG_FILES.values())
        super().error(masked(message))  # what it does not know may hold an address with a key


def config_parser(description: str, default: Path) -> argparse.ArgumentParser:
    """A command line that names a configuration; read it with `parse_intermixed_args`."""
    forgive_console()
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    told = f"YAML file or its folder; default {default.relative_to(CONFIG_DIR.parent).as_posix()}"
    parser.add_argument("--config", type=Path, default=default, metavar="PATH", help=told)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="values to replace, such as data.approach=pku_safe",
    )
    return parser


def forgive_console() -> None:
    """Print `?` for a character that the console has not: a pipe on Windows is in cp1252, and paths may hold anything."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


@contextmanager
def user_errors_exit(advice: str = "") -> Iterator[None]:
    """Turn what the user can mend into a line on stderr, `advice` below it, and exit status 2; Ctrl-C into a line and 130."""
    try:
        yield
    except (UserError, OSError, ImportError) as error:
        if not (line := user_line(error) or missing_package(error)):
            raise
        print(f"{with_options(line)}\n{advice}".rstrip(), file=sys.stderr)
        raise SystemExit(USER_ERROR_STATUS) from None
    except (StoppedError, KeyboardInterrupt) as stop:
        said = str(stop) or "stopped; what is finished is kept, and the same command goes on from there"
        print(said, file=sys.stderr)
        raise SystemExit(getattr(stop, "status", INTERRUPTED_STATUS)) from None


def check_setup(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each thing the project needs, or of a base model; return 0, or 1 (2) where something is missing."""
    parser = config_parser(__doc__ or "", CONFIG_DIR / "reward_model_config.yaml")
    parser.add_argument("--load", action="store_true", help="check the base model, its weights too")
    options = parser.parse_intermixed_args(arguments)
    if options.load or any(re.match(r"(reward_model_config\.)?model\.", text) for text in options.overrides):
        from prmd.config.loading import RewardModelConfig, load_pipeline

        start_run_log(load_pipeline(options.config, options.overrides)[RewardModelConfig].paths)
        from prmd import model_check

        checks = model_check.check_configured(options.config, options.overrides, load=options.load)
        lines, status = model_check.report(checks), USER_ERROR_STATUS
    else:
        checks = check_everything(options.config, options.overrides)
        lines, status = report(checks), 1
    print(*lines, sep="\n")
    return status if any(check.status == "fail" for check in checks) else 0


if __name__ == "__main__":
    with user_errors_exit():
        sys.exit(check_setup())
