"""The layers and the one-owner rules, read from the source with `ast`: who may import whom, and who may call what."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from prmd.objectives import OBJECTIVES
from prmd.paths import PROJECT_ROOT, reward_model_command, stage_command

LAYERS = {
    "maths": """
        losses pessimism calibration statistics kl lower_tail paper_margins intervals comparisons outcomes reliability
        resampling reference_scores proxies over_optimisation verdicts gate maxmin ngram_regression""",
    "foundations": """
        errors config config_sections config_evaluation config_file config_mistakes objectives paths io runtime provenance setup_check""",
    "parts": """
        preferences transcripts splits pair_builders pairs_pku sources local_rows raw_data tokenization
        pair_batches attention models lora sequence_models reward_models reward_metrics ensemble adapter_members trainer_arguments trainer training reporting wheels
        checkpoints precision memory dry_run rehearsal memory_accounting memory_plan memory_report dpo_baseline scoring primer_scoring rewardbench
        cache generation vllm_engine adapters sharding reference response_kl reward_data reward_training policy_pairs policy_data policy_targets policy_metrics policy_comparison benchmark_comparison policy_evaluation checkpoint_frontier contenders judges benchmarks
        policy_methods policy_rewards policy_notes policy_samples policy_inputs policy_selection policy_soup policy_gate
        endpoint chats refusals rubrics label_classifiers text_judges judge_cards toxicity""",
    "stages": "data_preparation data_summary reward_modeling reward_fitting policy_training evaluation",
    "presentation": """
        plotting plotting_rewards plotting_evaluation plotting_frontier plotting_study report report_headline report_evaluation report_comparisons
        report_measures report_sections report_tables""",
}
"""Every module of `prmd` by name; a package stands for all its files. A new module is added here."""

MAY_IMPORT = {
    "maths": {"maths"},
    "foundations": {"foundations"},
    "parts": {"parts", "maths", "foundations"},
    "stages": {"stages", "parts", "maths", "foundations", "presentation"},
    "presentation": {"presentation", "maths", "foundations"},
}
MATHS_LIBRARIES = {"torch", "numpy", "scipy"}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules.split()}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

MODULES = sorted((PROJECT_ROOT / "prmd").rglob("*.py"))
SCRIPTS = sorted(PROJECT_ROOT.glob("[0-9]_*/*.py"))
PROGRAMS = [
    PROJECT_ROOT / "utils.py",
    PROJECT_ROOT / "run_pipeline.py",
    *sorted(PROJECT_ROOT.glob("benchmarks/*.py")),
]
SOURCES = [*MODULES, *SCRIPTS, *PROGRAMS]


def name_of(path: Path) -> str:
    """`prmd/benchmarks/mt_bench.py` -> `benchmarks`; `utils.py` -> `utils`."""
    parts = path.relative_to(PROJECT_ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "prmd" else "/".join(parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a file; `from prmd import io` gives `prmd.io`."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            yield from (
                [f"prmd.{a.name}" for a in node.names] if node.module == "prmd" else [node.module or ""]
            )


def calls_of(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(last name of what is called, call) for every call in a file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            function = node.func
            yield (
                (function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")),
                node,
            )


def callers(name: str) -> set[str]:
    return {name_of(path) for path in SOURCES for called, _ in calls_of(path) if called == name}


def importers(library: str) -> set[str]:
    return {name_of(p) for p in SOURCES if any(i.split(".")[0] == library for i in imports_of(p))}


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(PROJECT_ROOT).as_posix()}:{node.lineno}"


# ------------------------------------------------------------------ layers
def test_every_module_has_one_layer() -> None:
    listed = [module for modules in LAYERS.values() for module in modules.split()]
    assert len(listed) == len(set(listed))
    present = {name_of(path) for path in MODULES} - {"__init__"}
    assert present - set(listed) == set(), "give the new module a layer at the top of this file"


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p) in LAYER_OF], ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    layer = LAYER_OF[name_of(path)]
    for imported in imports_of(path):
        library, _, rest = imported.partition(".")
        if library == "prmd":
            target = rest.split(".")[0]
            assert LAYER_OF.get(target) in MAY_IMPORT[layer], f"{name_of(path)} ({layer}) imports {imported}"
        elif layer == "maths":
            assert library in MATHS_LIBRARIES | set(sys.stdlib_module_names), f"{name_of(path)}: {imported}"


def test_the_library_knows_no_script() -> None:
    outside = {"utils", "run_pipeline", "tests", *(path.stem for path in SCRIPTS)}
    for path in MODULES:
        assert not outside & {name.split(".")[0] for name in imports_of(path)}, path


def test_the_maths_writes_no_log_and_opens_no_file() -> None:
    for path in (p for p in MODULES if LAYER_OF.get(name_of(p)) == "maths"):
        assert not {"logging", "pathlib", "os"} & set(imports_of(path)), path
        assert not {"open", "read_text", "write_text"} & {name for name, _ in calls_of(path)}, path


# ------------------------------------------------------------------ scripts
def test_the_ten_scripts_are_there() -> None:
    assert [path.relative_to(PROJECT_ROOT).as_posix() for path in SCRIPTS] == [
        "1_data_preparation/download_dataset.py",
        "1_data_preparation/split_objectives.py",
        "2_reward_modeling/train_harmless_rm.py",
        "2_reward_modeling/train_helpful_rm.py",
        "2_reward_modeling/train_honest_rm.py",
        "3_policy_training/baseline_dpo.py",
        "3_policy_training/hierarchical_dpo.py",
        "3_policy_training/pessimistic_dpo.py",
        "4_evaluation/benchmark_eval.py",
        "4_evaluation/compute_metrics.py",
    ]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_wiring(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 25
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for node in ast.walk(tree_of(path)) if isinstance(node, definitions)]
    imported = {name for name in imports_of(path) if name not in ("sys", "pathlib", "utils")}
    assert len(imported) == 1 and LAYER_OF[imported.pop().removeprefix("prmd.")] == "stages"
    assert [name for name, _ in calls_of(path)].count("run_stage") == 1
    docstring = ast.get_docstring(tree_of(path)) or ""
    command = f"python {path.relative_to(PROJECT_ROOT).as_posix()} --config configs/"
    assert all(word in docstring for word in (command, "Reads   ", "Writes  "))


@pytest.mark.parametrize("name", ["utils.py", "run_pipeline.py"])
def test_programs_stay_short(name: str) -> None:
    assert len((PROJECT_ROOT / name).read_text(encoding="utf-8").splitlines()) <= 150


def test_nothing_shadows_utils() -> None:
    assert not (PROJECT_ROOT / "tests" / "utils.py").exists()


# ------------------------------------------------------------------ one owner each
def test_one_owner_each() -> None:
    assert importers("matplotlib") <= {"plotting"}
    assert importers("yaml") <= {"config_file", "provenance"}
    assert callers("from_pretrained") <= {"models"}
    assert callers("load_dataset") <= {"sources"}
    assert callers("save_file") | callers("load_file") <= {"io"}


def test_provenance_writes_yaml_and_only_config_file_reads_it() -> None:
    [path] = (p for p in MODULES if name_of(p) == "provenance")
    names = (n for n in ast.walk(tree_of(path)) if isinstance(n, ast.Attribute))
    assert {n.attr for n in names if ast.unparse(n.value) == "yaml"} == {"safe_dump"}
    assert "prmd.config_file" not in imports_of(path)


def docstrings_of(path: Path) -> set[int]:
    owners = [
        n for n in ast.walk(tree_of(path)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))
    ]
    firsts = [owner.body[0] for owner in owners if owner.body]
    return {id(first.value) for first in firsts if isinstance(first, ast.Expr)}


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p) != "paths"], ids=name_of)
def test_only_paths_spells_a_directory(path: Path) -> None:
    texts = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    directory = re.compile(r"(data|models|outputs|logs)/[\w./-]*")
    assert not [
        where(path, n) for n in texts if directory.fullmatch(n.value) and id(n) not in docstrings_of(path)
    ]


def test_only_paths_says_what_a_path_given_by_a_user_means() -> None:
    assert callers("expanduser") == {"paths"}
    for path in (p for p in SOURCES if name_of(p) != "paths"):
        nodes = list(ast.walk(tree_of(path)))
        spelled = {
            id(n.left)
            for n in nodes
            if isinstance(n, ast.BinOp)
            and isinstance(n.right, ast.Constant)
            and isinstance(n.right.value, str)
        }
        defaults = {id(d) for n in nodes if isinstance(n, ast.FunctionDef) for d in n.args.defaults}
        roots = [n for n in nodes if isinstance(n, ast.Name) and n.id == "PROJECT_ROOT"]
        assert not [where(path, n) for n in roots if id(n) not in spelled | defaults], (
            "use paths.resolve_user_path"
        )


def test_only_paths_spells_a_command_of_a_stage() -> None:
    commands = [stage_command(path.stem) for path in SCRIPTS if not path.stem.endswith("_rm")]
    commands += [reward_model_command(objective) for objective in OBJECTIVES]
    scripts = [path.relative_to(PROJECT_ROOT).as_posix() for path in SCRIPTS]
    assert sorted(commands) == [f"python {script}" for script in scripts]
    for path in (p for p in MODULES if name_of(p) != "paths"):
        texts = [
            n for n in ast.walk(tree_of(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        ]
        assert not [where(path, n) for n in texts if re.search(r"python [1-4]_", n.value)], (
            "use stage_command"
        )


# ------------------------------------------------------------------ what nobody may do
def test_the_library_does_not_print() -> None:
    assert not [where(p, call) for p in MODULES for name, call in calls_of(p) if name == "print"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PROJECT_ROOT).as_posix())
def test_nothing_runs_code_from_data(path: Path) -> None:
    assert not PICKLES & {name.split(".")[0] for name in imports_of(path)}
    for name, call in calls_of(path):
        keywords = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
        assert keywords.get("trust_remote_code") is not True, where(path, call)
        assert keywords.get("allow_pickle") is not True, where(path, call)
        assert name not in ("eval", "exec") or isinstance(call.func, ast.Attribute), where(path, call)
        torch_load = ast.unparse(call.func) in ("torch.load", "torch.jit.load")
        assert not torch_load or keywords.get("weights_only") is True, where(path, call)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PROJECT_ROOT).as_posix())
def test_nothing_that_windows_lacks(path: Path) -> None:
    for name, call in calls_of(path):
        written = ast.unparse(call.func)
        assert written not in ("os.fork", "os.symlink", "os.system") and name != "symlink_to", where(
            path, call
        )
        assert "'fork'" not in ast.unparse(call), where(path, call)
        if name in ("read_text", "write_text") and written.split(".")[0] != "io":
            encoded = any(k.arg == "encoding" for k in call.keywords)
            assert encoded or isinstance(call.func, ast.Name), f"{where(path, call)}: encoding is not given"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PROJECT_ROOT).as_posix())
def test_every_module_and_public_function_says_what_it_is(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree), f"{path} has no docstring"
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    public = [n for n in tree.body if isinstance(n, functions) and not n.name.startswith("_")]
    assert not [where(path, n) for n in public if not ast.get_docstring(n)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PROJECT_ROOT).as_posix())
def test_every_signature_is_typed(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare and (node.returns is not None), f"{where(path, node)}: {node.name} {bare}"
