"""Stage 3: distil the pessimistic reward of the ensembles into policies, beside a plain DPO baseline.

    Delta* = clip(reward_scale [R(x, y_w) - R(x, y_l)], +-margin_clip),   L = (Delta* - Delta_theta)^2
    Delta_theta = beta [log pi_theta/pi_ref (x, y_w) - log pi_theta/pi_ref (x, y_l)]

R is a method's aggregate of the calibrated rewards of all K x M members (`pessimism.aggregation`). What the methods are is in
`methods`, what each training is fed in `inputs`, targets and losses in `targets`; every method sees the same labelled pairs in
the same order. The TRL baseline is in `trl_baseline`, the closed-form gate in `preview`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.artifacts.manifest import EVERYTHING
from prmd.artifacts.paths import policy_command, stage_command
from prmd.artifacts.runs import (
    finish_run,
    is_current,
    partial_directory,
    publish,
    read_run,
    refuse_replacing,
    require_artifact,
    start_run,
    write_step_result,
)
from prmd.config.policy import PolicyConfig, PolicySection
from prmd.errors import DataError
from prmd.inference.reference import check_engine
from prmd.models.bases import base_record
from prmd.models.loading import add_lora, load_causal_lm, load_tokenizer
from prmd.models.sequence_models import SequenceLogps
from prmd.pessimism.losses import UNDER_TRAINED
from prmd.policies.edpo import check_launch, choosing_members
from prmd.policies.inputs import (
    Keys,
    MethodInputs,
    Prepared,
    method_inputs,
    policy_fingerprints,
    prepare,
    say_inputs,
)
from prmd.policies.methods import (
    BASELINE,
    SOUP,
    check_methods,
    method_of,
    reference_sample_count,
    soup_members,
)
from prmd.policies.pairs import PairTokens, PolicyPairs, read_splits
from prmd.policies.preview import describe_gate, describe_policies, gamma_lengths, preview_gate
from prmd.policies.soup import average_policies
from prmd.policies.targets import describe_targets, policy_loss, with_clip
from prmd.policies.trl_baseline import train_trl_dpo, unweighted_notes
from prmd.report import figures
from prmd.report.policy_sections import training_outcome
from prmd.rewards.reward_model import load_reward_models
from prmd.runtime import is_main_process, set_seed, wait_for_everyone
from prmd.training.checkpoints import copy_model, name_checkpoints, trained_once
from prmd.training.run import TrainingRun, check_training, run_training

logger = logging.getLogger(__name__)


def train_baseline_dpo(config: PolicyConfig, *, force: bool = False, dry_run: bool = False) -> Path:
    """Train the plain DPO baseline with TRL's own trainer on the same pooled pairs."""
    return _train_methods(config, (BASELINE,), force, dry_run)


def train_pessimistic(config: PolicyConfig, *, force: bool = False, dry_run: bool = False) -> Path:
    """Train one policy for each of `policy.methods`."""
    if not config.policy.methods:
        logger.info("policy.methods is empty: no pessimistic policy to train")
        return config.paths.policies
    path = _train_methods(config, config.policy.methods, force, dry_run)
    if dry_run:
        preview_gate(config)
    return path


def train_hierarchical(config: PolicyConfig, *, force: bool = False, dry_run: bool = False) -> Path:
    """Train the hierarchical policy: worst within each objective, then worst objective."""
    return _train_methods(config, ("hierarchical",), force, dry_run)


def _train_methods(config: PolicyConfig, methods: Sequence[str], force: bool, dry_run: bool) -> Path:
    shared, policy, training = config.shared, config.policy, config.training
    check_methods(methods, policy, samples=reference_sample_count(config.pairs, shared.calibration))
    if any(method_of(method).loss == "edpo" for method in methods if method != SOUP):
        check_launch()
    trained = [method for method in dict.fromkeys(methods) if method != SOUP]
    if dry_run:
        describe_policies(config, methods)
        return config.paths.policies
    splits = read_splits(config.paths)  # refuses missing or empty ones before anything is loaded or written
    tokenizer = load_tokenizer(shared.model, config.paths)
    folders = PolicyFolders(config, force)
    key = partial(policy_fingerprints, config, tokenizer=tokenizer, train=splits["train"])
    if SOUP in methods:
        _check_soup(folders, key, being_trained=trained)
    rewarded = any(method_of(method).reads_rewards for method in trained)
    models = load_reward_models(shared) if rewarded else []
    todo = _not_finished(folders, trained, partial(key, models=models))
    if todo:
        check_engine(shared.calibration)
        check_training(
            *(shared.model, shared.paths, config.tuning, training),
            task="policy",
            directory=folders.of(next(iter(todo))),
            sampled=gamma_lengths(policy, list(todo), shared.calibration.max_new_tokens),
            trainings=len(todo),
        )
        tokens = PairTokens(tokenizer, max_length=training.max_length, over_length=training.over_length)
    for objective in dict.fromkeys(method_of(method).objective for method in todo):
        alike = {m: fingerprint for m, fingerprint in todo.items() if method_of(m).objective == objective}
        prepared = prepare(config, list(alike), models, tokens, splits)
        if prepared.scores and reference_sample_count(config.pairs, shared.calibration):
            describe_gate(config, models, tokens, splits)
        _train_alike(alike, prepared, folders, tokenizer)
    if SOUP in methods:
        _make_soup(folders, key)
    return config.paths.policies


@dataclass(frozen=True)
class PolicyFolders:
    """Where the policies of a run lie, and what is recorded with each.

    Attributes:
        force: replace what is finished.
    """

    config: PolicyConfig
    force: bool

    def of(self, method: str) -> Path:
        """A policy's folder."""
        return self.config.paths.policy(method, self.config.run_name)

    def holds(self, method: str, fingerprints: Keys) -> bool:
        """Whether a policy is finished and to be reused; says so."""
        directory = self.of(method)
        if self.force or not is_current(directory, *fingerprints):
            return False
        logger.info("policy %s: finished before with the same settings, reused: %s", method, directory)
        return True

    def refuse_replacing(self, method: str, fingerprints: Keys) -> None:
        """Refuse to replace a finished policy of other settings unasked.

        Raises:
            ConfigError: there is one.
        """
        if not self.force:
            refuse_replacing(self.of(method), *fingerprints, what=f"policy {method}")

    def write(
        self, method: str, fingerprint: str, make: Callable[[Path, Path], dict[str, Any]], **also: Any
    ) -> None:
        """Build a policy's folder and publish it.

        Args:
            make: (folder, log directory) -> its metrics; leaves the weights in the folder.
            also: further metrics.
        """
        config, paths, directory = self.config, self.config.paths, self.of(method)
        clock, partial_folder = start_run(), partial_directory(directory, fingerprint, self.force)
        log_directory = paths.logs("policies", paths.approach, directory.name)
        metrics: dict[str, Any] = {"method": directory.name, "approach": paths.approach, "notes": []}
        with io.disk_errors_named(partial_folder):
            metrics |= make(partial_folder, log_directory) | also
        if is_main_process():
            path = io.write_json(partial_folder / "metrics.json", metrics)
            figures.plot_policy_training(path, paths.visualizations)
            inputs = {"policy": fingerprint, "base": base_record(config.shared.model, paths)}
            finish_run(partial_folder, config=config, inputs=inputs, fingerprint=fingerprint, clock=clock)
        publish(partial_folder, directory)
        if is_main_process():
            run, took = read_run(directory) or {}, ("seconds", "peak_memory_bytes")
            result = {key: metrics.get(key) for key in ("reward_scale", "notes")} | training_outcome(metrics)
            result |= {"artifact": str(directory), **{key: run.get(key) for key in took}}
            write_step_result(paths, f"train_{directory.name}", result)
            logger.info("policy %s: written to %s", method, directory)


def _not_finished(
    folders: PolicyFolders, methods: Sequence[str], key: Callable[[str], Keys]
) -> dict[str, str]:
    """The methods to train with their fingerprints; a finished one is reused, one of other settings not replaced unasked."""
    keys = {method: key(method) for method in methods}
    todo = {
        method: fingerprints
        for method, fingerprints in keys.items()
        if not folders.holds(method, fingerprints)
    }
    for method, fingerprints in todo.items():
        folders.refuse_replacing(method, fingerprints)
    return {method: fingerprints[0] for method, fingerprints in todo.items()}


# ------------------------------------------------------------------ training
def _train_alike(
    methods: Mapping[str, str],
    prepared: Prepared,
    folders: PolicyFolders,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Train methods that see the same pairs; all their targets are made before the first one is trained.

    Args:
        methods: their fingerprints by name.
    """
    config = folders.config
    inputs = {m: method_inputs(config, m, prepared) for m in methods if m != BASELINE}
    for method, own in inputs.items():
        say_inputs(method, own)
    for method, fingerprint in methods.items():
        train: Callable[[Path, Path], dict[str, Any]]
        if method == BASELINE:
            train = partial(_train_baseline, config, prepared.pairs, prepared.held_out, tokenizer)
        else:
            train = partial(_distil, config, method, inputs.pop(method), tokenizer)
        folders.write(method, fingerprint, train, draws=prepared.draws)


def _train_baseline(
    config: PolicyConfig,
    pairs: PolicyPairs,
    held_out: PolicyPairs,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    log_directory: Path,
) -> dict[str, Any]:
    notes = unweighted_notes(pairs.tokenized.pairs)
    for note in notes:
        logger.warning("policy %s: %s", BASELINE, note)

    where = {"directory": folder, "log_directory": log_directory}
    train = partial(train_trl_dpo, config, pairs, held_out.tokenized, tokenizer, **where)
    curve, steps = trained_once(folder, train)
    if is_main_process():
        name_checkpoints(folder, steps)  # the reward-KL frontier has points of every method
    return {"curve": curve, "notes": notes}


def _distil(
    config: PolicyConfig,
    method: str,
    inputs: MethodInputs,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    log_directory: Path,
) -> dict[str, Any]:
    """Train one policy with our trainer."""
    shared, tuning = config.shared, config.tuning

    def load(master_weights: bool) -> SequenceLogps:
        model = load_causal_lm(shared.model, shared.paths, master_weights=master_weights)
        lora = tuning.method == "lora"
        return SequenceLogps(add_lora(model, tuning.lora, task="CAUSAL_LM") if lora else model)

    kind = method_of(method).loss
    policy = with_clip(config.policy, inputs.targets)
    before_step = None
    if kind == "edpo":
        before_step = choosing_members(inputs.train, beta=policy.beta, pad_id=tokenizer.pad_token_id)
    set_seed(shared.seed)
    run = TrainingRun(
        name=f"policy {method}",
        directory=folder,
        shared=shared,
        tuning=tuning,
        training=config.training,
        data=inputs.train,
        stream=inputs.stream,
        eval_data=inputs.held_out,
        loss_function=partial(policy_loss, policy=policy, kind=kind),
        before_step=before_step,
        load_model=load,
        log_directory=log_directory,
        task="policy",
        sampled=gamma_lengths(policy, [method], shared.calibration.max_new_tokens),
    )
    history, steps = trained_once(folder, lambda: run_training(run, tokenizer))
    if is_main_process():
        name_checkpoints(folder, steps)
        copy_model(folder / "checkpoints" / "end", folder)
    return _described(method, inputs, history, policy)


def _described(
    method: str, inputs: MethodInputs, history: Sequence[Mapping[str, float]], policy: PolicySection
) -> dict[str, Any]:
    """What the metrics of a policy hold of its targets and its training."""
    described = describe_targets(inputs.targets) if inputs.targets else {}
    found = [row for row in history if "eval_targets/sd_ratio" in row]
    if found:
        names = ("slope", "sd_ratio", "explained")
        reached = {name: found[-1][f"eval_targets/{name}"] for name in names}
        described["held_out_learning"] = reached
        level = logging.WARNING if reached["sd_ratio"] < UNDER_TRAINED else logging.INFO
        text = "policy %s: held-out margins: slope on their targets %.2f, sd ratio %.2f, explained %.2f"
        logger.log(level, text, method, *reached.values())
        described["kl_target"] = policy.kl_target if policy.reward_scale == "auto" else None
    return {**described, **inputs.debiased, "notes": list(inputs.notes), "curve": list(history)}


# ------------------------------------------------------------------ soup
def _check_soup(folders: PolicyFolders, key: Callable[[str], Keys], being_trained: Sequence[str]) -> None:
    """Refuse a soup of policies that are not there.

    Args:
        key: method -> the fingerprints it has with the settings of the run.

    Raises:
        DataError: one that is not about to be trained is missing, or was trained with other settings.
    """
    names = soup_members(folders.config.paths.objectives)
    for name in names:
        source = folders.of(name)
        if name in being_trained or is_current(source, *key(name)):
            continue
        state = "was trained with other settings or data" if read_run(source) else "is missing"
        members = ", ".join(names)
        command = f'{stage_command("pessimistic_dpo")} "policy.methods=[{members}]"'
        raise DataError(f"soup averages {members}, and {source} {state}; train them with: {command}")


def _make_soup(folders: PolicyFolders, key: Callable[[str], Keys]) -> None:
    """Average the finished per-objective policies; nothing is trained."""
    objectives = folders.config.policy.weights
    names, weights = soup_members(objectives), list(objectives.values())
    sources, keys = [folders.of(name) for name in names], [key(name) for name in names]
    fingerprints = tuple(io.fingerprint([SOUP, list(alike), weights]) for alike in zip(*keys, strict=True))
    if folders.holds(SOUP, fingerprints):
        return
    folders.refuse_replacing(SOUP, fingerprints)
    for source in sources:
        command = policy_command(source.name)
        require_artifact(source, what=f"policy {source.name}", command=command, read=EVERYTHING)

    def make(folder: Path, log_directory: Path) -> dict[str, Any]:
        if is_main_process():
            average_policies(sources, weights, folder)
        wait_for_everyone()
        shares = ", ".join(f"{w:.3g} {s.name}" for w, s in zip(weights, sources, strict=True))
        return {"notes": [f"the mean of {shares}; nothing was trained"]}

    folders.write(SOUP, fingerprints[0], make)
