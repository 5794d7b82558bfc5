"""Stage 3: distil the pessimistic reward of the ensembles into policies, beside a plain DPO baseline.

    Delta* = clip(reward_scale [R(x, y_w) - R(x, y_l)], +-margin_clip),   L = (Delta* - Delta_theta)^2
    Delta_theta = beta [log pi_theta/pi_ref (x, y_w) - log pi_theta/pi_ref (x, y_l)]

R is a method's aggregate of the calibrated rewards of all K x M members (`pessimism.aggregation`). What the methods are is in
`methods`, what each training is fed in `inputs`, targets and losses in `targets`; every method sees
the same labelled pairs in the same order. The TRL baseline is in `trl_baseline`, the closed-form gate in `preview`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.artifacts.paths import stage_command
from prmd.artifacts.runs import (
    finish_run,
    is_current,
    partial_directory,
    publish,
    read_run,
    refuse_replacing,
    start_run,
    write_step_result,
)
from prmd.config.loading import as_dict
from prmd.config.policy import PolicyConfig
from prmd.errors import DataError
from prmd.inference.reference import check_engine, reference_key
from prmd.models.loading import add_lora, load_causal_lm, load_tokenizer
from prmd.models.sequence_models import SequenceLogps
from prmd.objectives import OBJECTIVES
from prmd.pairs import read_pairs
from prmd.policies.edpo import loss_function
from prmd.policies.inputs import MethodInputs, Prepared, method_inputs, prepare
from prmd.policies.methods import (
    BASELINE,
    POLICY_METHODS,
    SOUP,
    SOUP_MEMBERS,
    check_methods,
    reference_sample_count,
    settings_read,
)
from prmd.policies.preview import describe_gate, describe_policies, gamma_lengths, preview_gate
from prmd.policies.soup import average_policies
from prmd.policies.targets import describe_targets
from prmd.policies.trl_baseline import train_trl_dpo
from prmd.report import figures
from prmd.rewards.reward_model import RewardModel, load_reward_models
from prmd.runtime import is_main_process, set_seed, wait_for_everyone
from prmd.training.checkpoints import copy_model, name_checkpoints
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
    check_methods(config, methods)
    trained = [method for method in dict.fromkeys(methods) if method != SOUP]
    if dry_run:
        describe_policies(config, methods)
        return config.paths.policies
    _check_data(config)
    tokenizer = load_tokenizer(config.shared.model, config.paths)
    if SOUP in methods:
        _check_soup(config, tokenizer, being_trained=trained)
    rewarded = any(POLICY_METHODS[method].reads_rewards for method in trained)
    models = load_reward_models(config.shared) if rewarded else []
    todo = _not_finished(config, trained, tokenizer, models, force)
    if todo:
        check_engine(config.shared)
        settings, sampled = (config.shared, config.tuning, config.training), gamma_lengths(config, list(todo))
        directory = config.paths.policy(next(iter(todo)), config.run_name)
        check_training(*settings, task="policy", directory=directory, sampled=sampled)
    for objective in dict.fromkeys(POLICY_METHODS[method].objective for method in todo):
        alike = {m: key for m, key in todo.items() if POLICY_METHODS[m].objective == objective}
        _train_alike(config, alike, objective, tokenizer, models, force)
    if SOUP in methods:
        _make_soup(config, tokenizer, force)
    return config.paths.policies


def _check_data(config: PolicyConfig) -> None:
    """Refuse missing or empty splits before anything is loaded or written."""
    for objective in OBJECTIVES:
        for split in ("train", "val"):
            read_pairs(config.paths, objective, split)


def _not_finished(
    config: PolicyConfig,
    methods: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    models: Sequence[RewardModel],
    force: bool,
) -> dict[str, str]:
    """The methods to train with their fingerprints; a finished one is reused, one of other settings not replaced unasked."""
    todo = {}
    for method in methods:
        directory = config.paths.policy(method, config.run_name)
        fingerprint = _fingerprint(config, method, tokenizer, models)
        if not force and is_current(directory, fingerprint):
            logger.info("policy %s: finished before with the same settings, reused: %s", method, directory)
        else:
            todo[method] = fingerprint
    for method in todo if not force else ():
        refuse_replacing(config.paths.policy(method, config.run_name), what=f"policy {method}")
    return todo


def _fingerprint(
    config: PolicyConfig,
    method: str,
    tokenizer: PreTrainedTokenizerBase,
    models: Sequence[RewardModel] = (),
) -> str:
    """Key of everything a finished policy depends on, and of nothing its method does not read.

    Args:
        models: the reward models of all objectives; may be left out where the method reads no rewards.
    """
    values, paths, rewarded = as_dict(config), config.paths, POLICY_METHODS[method].reads_rewards
    shared = values["reward_model_config"]
    splits = [paths.split(objective, split) for objective in OBJECTIVES for split in ("train", "val")]
    data, keys = io.files_sha256(splits), [model.fingerprint for model in models] if rewarded else []
    parts = [method, settings_read(config, method), values["tuning"], values["training"], shared["seed"]]
    calibration = shared["calibration"] if rewarded else None
    return io.fingerprint([*parts, calibration, reference_key(config.shared, tokenizer), data, keys])


# ------------------------------------------------------------------ training
def _train_alike(
    config: PolicyConfig,
    methods: Mapping[str, str],
    objective: str | None,
    tokenizer: PreTrainedTokenizerBase,
    models: Sequence[RewardModel],
    force: bool,
) -> None:
    """Train methods that see the same pairs; all their targets are made before the first one is trained.

    Args:
        methods: their fingerprints by name.
        objective: whose pairs these are; None: those of all.
        models: the reward models of all objectives; none where no method of the stage reads rewards.
    """
    prepared = prepare(config, tokenizer, list(methods), objective, models)
    rewarded = any(POLICY_METHODS[method].reads_rewards for method in methods)
    if rewarded and reference_sample_count(config):
        describe_gate(config, models, tokenizer)
    inputs = {method: method_inputs(config, method, prepared) for method in methods if method != BASELINE}
    for method, own in inputs.items():
        for note in own.notes:
            logger.info("policy %s: %s", method, note)
    for method, fingerprint in methods.items():
        train: Callable[[Path, Path], dict[str, Any]]
        if method == BASELINE:
            train = partial(_train_baseline, config, tokenizer, prepared)
        else:
            train = partial(_distil, config, method, inputs.pop(method), tokenizer)
        _write_policy(config, method, fingerprint, force, train)


def _write_policy(
    config: PolicyConfig,
    method: str,
    fingerprint: str,
    force: bool,
    make: Callable[[Path, Path], dict[str, Any]],
) -> None:
    """Build a policy's folder and publish it.

    Args:
        make: (folder, log directory) -> its metrics; leaves the weights in the folder.
    """
    directory = config.paths.policy(method, config.run_name)
    clock, partial_folder = start_run(), partial_directory(directory, fingerprint, force)
    log_directory = config.paths.logs("policies", config.paths.approach, directory.name)
    metrics: dict[str, Any] = {"method": directory.name, "approach": config.paths.approach, "notes": []}
    metrics |= make(partial_folder, log_directory)
    if is_main_process():
        path = io.write_json(partial_folder / "metrics.json", metrics)
        figures.plot_policy_training(path, config.paths.visualizations)
        inputs = {"policy": fingerprint}
        finish_run(partial_folder, config=config, inputs=inputs, fingerprint=fingerprint, clock=clock)
    publish(partial_folder, directory)
    if is_main_process():
        result = {key: metrics.get(key) for key in ("reward_scale", "notes")}
        write_step_result(config.paths, f"train_{directory.name}", {"artifact": str(directory), **result})
        logger.info("policy %s: written to %s", method, directory)


def _train_baseline(
    config: PolicyConfig,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    folder: Path,
    log_directory: Path,
) -> dict[str, Any]:
    return {"curve": train_trl_dpo(config, tokenizer, prepared.pairs, folder, log_directory)}


def _distil(
    config: PolicyConfig,
    method: str,
    inputs: MethodInputs,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    log_directory: Path,
) -> dict[str, Any]:
    """Train one policy with our trainer."""
    loaded: list[SequenceLogps] = []

    def load(master_weights: bool) -> SequenceLogps:
        model = load_causal_lm(config.shared.model, config.paths, master_weights=master_weights)
        lora = config.tuning.method == "lora"
        loaded.append(SequenceLogps(add_lora(model, config.tuning.lora, task="CAUSAL_LM") if lora else model))
        return loaded[-1]

    set_seed(config.shared.seed)
    run = TrainingRun(
        name=f"policy {method}",
        directory=folder,
        shared=config.shared,
        tuning=config.tuning,
        training=config.training,
        data=inputs.train,
        stream=inputs.stream,
        eval_data=inputs.held_out,
        loss_function=loss_function(config, method, inputs, tokenizer.pad_token_id, lambda: loaded[-1]),
        load_model=load,
        log_directory=log_directory,
        task="policy",
        sampled=gamma_lengths(config, [method]),
    )
    history, steps = run_training(run, tokenizer)
    if is_main_process():
        name_checkpoints(folder, steps)
        copy_model(folder / "checkpoints" / "end", folder)
    described = describe_targets(inputs.targets, config.policy.margin_clip) if inputs.targets else {}
    return {**described, "notes": list(inputs.notes), "curve": history}


# ------------------------------------------------------------------ soup
def _check_soup(
    config: PolicyConfig, tokenizer: PreTrainedTokenizerBase, being_trained: Sequence[str]
) -> None:
    """Refuse a soup of policies that are not there.

    Raises:
        DataError: one that is not about to be trained is missing, or was trained with other settings.
    """
    for name in SOUP_MEMBERS:
        source = config.paths.policy(name, config.run_name)
        if name in being_trained or is_current(source, _fingerprint(config, name, tokenizer)):
            continue
        state = "was trained with other settings or data" if read_run(source) else "is missing"
        members = ", ".join(SOUP_MEMBERS)
        command = f'{stage_command("pessimistic_dpo")} "policy.methods=[{members}]"'
        raise DataError(f"soup averages {members}, and {source} {state}; train them with: {command}")


def _make_soup(config: PolicyConfig, tokenizer: PreTrainedTokenizerBase, force: bool) -> None:
    """Average the finished per-objective policies; nothing is trained."""
    sources = [config.paths.policy(name, config.run_name) for name in SOUP_MEMBERS]
    keys = [_fingerprint(config, name, tokenizer) for name in SOUP_MEMBERS]
    weights = [config.policy.weights[POLICY_METHODS[name].objective] for name in SOUP_MEMBERS]
    directory, fingerprint = config.paths.policy(SOUP, config.run_name), io.fingerprint([SOUP, keys, weights])
    if not force and is_current(directory, fingerprint):
        logger.info("policy %s: finished before with the same settings, reused: %s", SOUP, directory)
        return
    if not force:
        refuse_replacing(directory, what=f"policy {SOUP}")

    def make(folder: Path, log_directory: Path) -> dict[str, Any]:
        if is_main_process():
            average_policies(sources, weights, folder)
        wait_for_everyone()
        shares = ", ".join(f"{w:.3g} {s.name}" for w, s in zip(weights, sources, strict=True))
        return {"notes": [f"the mean of {shares}; nothing was trained"]}

    _write_policy(config, SOUP, fingerprint, force, make)
