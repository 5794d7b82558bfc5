"""The rooms of the house, read from the source with `ast`: who may import whom, who may call what, and how large things are."""

import ast
import builtins
import importlib
import keyword
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from prmd.artifacts.paths import PROJECT_ROOT, TRAIN_COMMAND, reward_model_command, stage_command
from prmd.config.loading import CONFIG_FILES
from prmd.objectives import OBJECTIVES
from utils import config_file_of

LEVELS = (
    "errors objectives features",
    "pessimism statistics",
    "runtime",
    "artifacts",
    "config",
    "pairs",
    "report",
    "models",
    "data training inference",
    "rewards",
    "policies judges publishing",
    "benchmarks",
    "evaluation",
    "setup_check",
    "model_check",
)
"""Rooms of `prmd`, packages and root modules: each may import what stands above it. Rooms on one line do not import each other."""

LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms.split()}
MATHS = ("pessimism", "statistics")
MATHS_LIBRARIES = {"torch", "numpy", "scipy"}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

MODULES = sorted((PROJECT_ROOT / "prmd").rglob("*.py"))
SCRIPTS = sorted(PROJECT_ROOT.glob("[0-9]_*/*.py"))
PROGRAMS = [
    PROJECT_ROOT / "utils.py",
    PROJECT_ROOT / "run_pipeline.py",
    PROJECT_ROOT / "publish.py",
    *sorted(PROJECT_ROOT.glob("benchmarks/**/*.py")),
]
SOURCES = [*MODULES, *SCRIPTS, *PROGRAMS]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def shown(path: Path) -> str:
    return path.relative_to(PROJECT_ROOT).as_posix()


def room_of(path: Path) -> str:
    """A module's package below `prmd`, or the module itself where it stands there; the map `prmd/__init__.py` is in none."""
    part = path.relative_to(PROJECT_ROOT / "prmd").parts[0]
    return "" if part == "__init__.py" else part.removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a file; the imported module where it is one."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            whole = f"{node.module}."
            is_package = (PROJECT_ROOT / whole.replace(".", "/")).is_dir()
            yield from ([whole + a.name for a in node.names] if is_package else [whole.rstrip(".")])


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
    return {shown(path) for path in SOURCES for called, _ in calls_of(path) if called == name}


def importers(library: str) -> set[str]:
    return {shown(p) for p in SOURCES if any(i.split(".")[0] == library for i in imports_of(p))}


def where(path: Path, node: ast.AST) -> str:
    return f"{shown(path)}:{node.lineno}"


# ------------------------------------------------------------------ rooms
def test_every_module_is_in_a_room() -> None:
    listed = " ".join(LEVELS).split()
    assert len(listed) == len(set(listed))
    assert {room_of(path) for path in MODULES} - {""} <= set(listed), "give the new room a level above"


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p)], ids=shown)
def test_a_room_imports_what_stands_above_it(path: Path) -> None:
    room = room_of(path)
    for imported in imports_of(path):
        library, _, rest = imported.partition(".")
        target = rest.split(".")[0]
        if library == "prmd" and target != room:
            assert LEVEL_OF[target] < LEVEL_OF[room], f"{shown(path)} imports {imported}"
            assert room not in ("benchmarks", "evaluation") or target != "policies", (
                f"{shown(path)} imports {imported}: stage 4 reads the files of stage 3"
            )


def test_no_circle_inside_a_room() -> None:
    edges: dict[str, set[str]] = {}
    for path in MODULES:
        name = ".".join(path.relative_to(PROJECT_ROOT).with_suffix("").parts).removesuffix(".__init__")
        edges[name] = set(imports_of(path))
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for target in sorted(edges[name] & set(edges)):
                visit(target, (*way, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) in MATHS], ids=shown)
def test_the_maths_knows_tensors_alone(path: Path) -> None:
    for imported in imports_of(path):
        library, _, rest = imported.partition(".")
        known = MATHS_LIBRARIES | set(sys.stdlib_module_names)
        assert library in known or rest.split(".")[0] in ("errors", "objectives", room_of(path)), imported
    assert not {"logging", "pathlib", "os"} & set(imports_of(path))
    assert not {"open", "read_text", "write_text"} & {name for name, _ in calls_of(path)}


def test_the_library_knows_no_script() -> None:
    outside = {"utils", "run_pipeline", "tests", "benchmarks", *(path.stem for path in SCRIPTS)}
    for path in MODULES:
        assert not outside & {name.split(".")[0] for name in imports_of(path)}, path


# ------------------------------------------------------------------ sizes
def test_folders_hold_at_most_13_modules_and_the_root_at_most_8() -> None:
    folders = {p.parent for p in [*MODULES, *PROGRAMS] if p.parent != PROJECT_ROOT}
    for folder in folders:
        held = [p.name for p in folder.glob("*.py") if p.name != "__init__.py"]
        most = 7 if folder == PROJECT_ROOT / "prmd" else 13  # the map beside them is the eighth
        assert len(held) <= most, f"{shown(folder)}: {len(held)} modules"


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_modules_and_functions_fit_a_head(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450
    for node in ast.walk(tree_of(path)):
        if isinstance(node, FUNCTIONS):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 50, f"{where(path, node)}: {node.name} has {lines} lines"


@pytest.mark.parametrize("name", ["utils.py", "run_pipeline.py"])
def test_programs_stay_short(name: str) -> None:
    assert len((PROJECT_ROOT / name).read_text(encoding="utf-8").splitlines()) <= 180


# ------------------------------------------------------------------ scripts
def test_the_scripts_are_there() -> None:
    assert [shown(path) for path in SCRIPTS] == [
        "1_data_preparation/download_dataset.py",
        "1_data_preparation/split_objectives.py",
        "2_reward_modeling/train_harmless_rm.py",
        "2_reward_modeling/train_helpful_rm.py",
        "2_reward_modeling/train_honest_rm.py",
        "2_reward_modeling/train_rm.py",
        "3_policy_training/baseline_dpo.py",
        "3_policy_training/hierarchical_dpo.py",
        "3_policy_training/pessimistic_dpo.py",
        "4_evaluation/benchmark_eval.py",
        "4_evaluation/compute_metrics.py",
    ]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_wiring(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 25
    definitions = (*FUNCTIONS, ast.ClassDef, ast.Lambda)
    assert not [node for node in ast.walk(tree_of(path)) if isinstance(node, definitions)]
    assert set(imports_of(path)) == {"sys", "pathlib", "utils"}
    assert [name for name, _ in calls_of(path)].count("run_stage") == 1
    docstring = ast.get_docstring(tree_of(path)) or ""
    command = f"python {shown(path)} --config configs/"
    assert all(word in docstring for word in (command, "Reads   ", "Writes  "))
    named = re.findall(r"prmd/[\w/]+\.py", docstring.partition("\nCode    ")[2])
    assert named and all((PROJECT_ROOT / file).is_file() for file in named)


def stages() -> list[str]:
    """Every `package.module:function` that a script or the pipeline runs."""
    texts = [
        n.value
        for p in [*SCRIPTS, PROJECT_ROOT / "run_pipeline.py"]
        for n in ast.walk(tree_of(p))
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    return sorted({text for text in texts if re.fullmatch(r"prmd(\.\w+)+:\w+", text)})


def test_scripts_and_pipeline_run_the_same_stages() -> None:
    in_pipeline = [
        n.value
        for n in ast.walk(tree_of(PROJECT_ROOT / "run_pipeline.py"))
        if isinstance(n, ast.Constant) and n.value in stages()
    ]
    assert sorted(set(in_pipeline)) == stages() and len(stages()) == 8


@pytest.mark.parametrize("stage", stages())
def test_every_stage_named_in_a_string_resolves(stage: str) -> None:
    module, _, name = stage.partition(":")
    function = getattr(importlib.import_module(module), name)
    assert function.__annotations__["config"] is CONFIG_FILES[config_file_of(stage)]


def test_nothing_shadows_utils() -> None:
    assert not (PROJECT_ROOT / "tests" / "utils.py").exists()


# ------------------------------------------------------------------ one owner each
def test_one_owner_each() -> None:
    assert importers("matplotlib") <= {"prmd/report/figures.py"}
    assert importers("yaml") <= {
        "prmd/config/loading.py",
        "prmd/artifacts/runs.py",
    }  # runs.py writes config.yaml
    assert callers("from_pretrained") <= {
        "prmd/models/loading.py",
        "prmd/publishing/prmd_scorer.py",  # stands alone, outside the project
    }
    assert callers("load_dataset") <= {"prmd/data/readers.py"}
    assert callers("save_file") | callers("load_file") <= {"prmd/artifacts/io.py"}
    # the command line of a run is for its console: no file, card or page repeats it
    assert callers("with_options") <= {"utils.py", "run_pipeline.py"}


def test_runs_writes_yaml_and_only_loading_reads_it() -> None:
    path = PROJECT_ROOT / "prmd/artifacts/runs.py"
    names = (n for n in ast.walk(tree_of(path)) if isinstance(n, ast.Attribute))
    assert {n.attr for n in names if ast.unparse(n.value) == "yaml"} == {"safe_dump"}


def docstrings_of(path: Path) -> dict[int, ast.Constant]:
    """Docstrings of a file by the id of their node, also those below an assignment."""
    found = {}
    for owner in ast.walk(tree_of(path)):
        for node in (
            getattr(owner, "body", None) or () if not isinstance(owner, (ast.Lambda, ast.IfExp)) else ()
        ):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                found[id(node.value)] = node.value
    return found


@pytest.mark.parametrize("path", [p for p in MODULES if shown(p) != "prmd/artifacts/paths.py"], ids=shown)
def test_only_paths_spells_a_directory(path: Path) -> None:
    texts = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    directory = re.compile(r"(data|models|outputs|logs)/[\w./-]*")
    assert not [
        where(path, n) for n in texts if directory.fullmatch(n.value) and id(n) not in docstrings_of(path)
    ]


def test_only_paths_says_what_a_path_given_by_a_user_means() -> None:
    assert callers("expanduser") == {"prmd/artifacts/paths.py"}
    for path in (p for p in SOURCES if shown(p) != "prmd/artifacts/paths.py"):
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
        assert not [where(path, n) for n in roots if id(n) not in spelled | defaults], "use resolve_user_path"


def test_only_paths_spells_a_command_of_a_stage() -> None:
    commands = [stage_command(path.stem) for path in SCRIPTS if not path.stem.endswith("_rm")]
    commands += [*(reward_model_command(objective) for objective in OBJECTIVES), TRAIN_COMMAND]
    assert sorted(commands) == [f"python {shown(path)}" for path in SCRIPTS]
    for path in (p for p in MODULES if shown(p) != "prmd/artifacts/paths.py"):
        texts = [
            n for n in ast.walk(tree_of(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        ]
        assert not [where(path, n) for n in texts if re.search(r"python [1-4]_", n.value)], (
            "use stage_command"
        )


# ------------------------------------------------------------------ what nobody may do
def test_the_library_does_not_print() -> None:
    assert not [where(p, call) for p in MODULES for name, call in calls_of(p) if name == "print"]


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_nothing_runs_code_from_data(path: Path) -> None:
    assert not PICKLES & {name.split(".")[0] for name in imports_of(path)}
    for name, call in calls_of(path):
        keywords = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
        assert keywords.get("trust_remote_code") is not True, where(path, call)
        assert keywords.get("allow_pickle") is not True, where(path, call)
        assert name != "exec_module" or shown(path) == "prmd/rewards/functions.py", where(path, call)
        assert name not in ("eval", "exec") or isinstance(call.func, ast.Attribute), where(path, call)
        torch_load = ast.unparse(call.func) in ("torch.load", "torch.jit.load")
        assert not torch_load or keywords.get("weights_only") is True, where(path, call)


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_whether_code_of_a_model_runs_is_said_at_every_loading(path: Path) -> None:
    """Without it transformers asks at the keyboard; adapters hold no code."""
    for name, call in calls_of(path):
        if (
            name in ("from_pretrained", "from_config", "LLM")
            and ast.unparse(call.func).split(".")[0] != "PeftModel"
        ):
            assert "trust_remote_code" in {k.arg for k in call.keywords}, where(path, call)


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_every_module_and_public_function_says_what_it_is(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree), f"{path} has no docstring"
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    public = [n for n in tree.body if isinstance(n, functions) and not n.name.startswith("_")]
    assert not [where(path, n) for n in public if not ast.get_docstring(n)]


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_every_signature_is_typed(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare and (node.returns is not None), f"{where(path, node)}: {node.name} {bare}"


# ------------------------------------------------------------------ what is named exists
TESTS = sorted(PROJECT_ROOT.glob("tests/**/*.py"))
PAGES = sorted(
    p for pattern in ("*.md", "docs/*.md", "benchmarks/results/*.md") for p in PROJECT_ROOT.glob(pattern)
)
DATA = (".json", ".jsonl", ".md", ".csv", ".tex", ".safetensors", ".png", ".gz", ".parquet")
OTHERS_WORDS = {
    "Args",
    "Returns",
    "Raises",
    "eval_",
    "response_0_harm_category",
    "response_1_harm_category",
    "response_i_sha256",
}
"""Sections of docstrings, the prefix of metric keys, columns of published data that nothing here reads."""
FILE_NAME = re.compile(r"(?:[\w.-]+/)*[\w-]+\.(?:py|html|yaml|yml|sh)")


@cache
def project_files() -> frozenset[str]:
    folders = (
        "prmd",
        "tests",
        "benchmarks",
        "configs",
        "docs",
        ".ci",
        ".github",
        *(p.name for p in PROJECT_ROOT.glob("[0-9]_*")),
    )
    inside = (p for folder in folders for p in (PROJECT_ROOT / folder).rglob("*"))
    return frozenset(shown(p) for p in (*inside, *PROJECT_ROOT.iterdir()))


@cache
def strings() -> frozenset[str]:
    """Every string in code."""
    nodes = (node for path in {*SOURCES, *TESTS} for node in ast.walk(tree_of(path)))
    return frozenset(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))


@cache
def identifiers() -> frozenset[str]:
    """Every name that code uses or a string or YAML key spells, and every library that is imported."""
    found = {*dir(builtins), *keyword.kwlist}
    for path in {*SOURCES, *TESTS}:
        found |= set(path.relative_to(PROJECT_ROOT).with_suffix("").parts)
        prose = docstrings_of(path)
        for node in ast.walk(tree_of(path)):
            for field in ("id", "attr", "arg", "name", "asname", "module"):
                value = getattr(node, field, None)
                found |= set(value.split(".")) if isinstance(value, str) else set()
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                found |= set(re.findall(r"\w+", node.value))
    for path in [
        *PROJECT_ROOT.glob("configs/**/*.yaml"),
        *PROJECT_ROOT.glob("*.txt"),
        PROJECT_ROOT / "pyproject.toml",
    ]:
        found |= set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    return frozenset(found)


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of docstrings and comments of a Python file, or of a whole page without its code blocks."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield from enumerate(text.split("\n"), start=1)
        return
    for node in docstrings_of(path).values():
        yield node.lineno, str(node.value)
    with path.open("rb") as stream:
        for token in tokenize.tokenize(stream.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


def missing_name(said: str, path: Path) -> bool:
    """Whether a text between backticks names a file, a module or something in code that is not there."""
    if (
        said in strings()
        or said.split("/")[0] in ("data", "models", "logs", "outputs")
        or said.endswith(DATA)
    ):
        return False  # made by a run, or data of others
    if FILE_NAME.fullmatch(said):
        beside = shown(path.parent / said) if path.suffix == ".py" else said
        return not any(file == beside or f"/{file}".endswith(f"/{said}") for file in project_files())
    if not re.fullmatch(r"\w+(\.\w+)*(\(\))?", said):
        return False
    parts = said.removesuffix("()").split(".")
    looked_up = [
        found
        for folder in (path.parent, PROJECT_ROOT / "prmd", PROJECT_ROOT)
        if (found := resolves(parts, folder)) is not None
    ]
    return not any(looked_up) if looked_up else not set(parts) <= identifiers() | OTHERS_WORDS


def resolves(parts: list[str], folder: Path) -> bool | None:
    """Whether `room.module.name` or `module.name` is there, seen from a folder; None where it is no module's name."""
    known = identifiers_of_yaml()  # some sections of the configuration are called as modules are
    if len(parts) > 1 and (folder / parts[0] / f"{parts[1]}.py").is_file():
        return len(parts) == 2 or parts[2] in names_in(folder / parts[0] / f"{parts[1]}.py") | known
    if len(parts) > 1 and folder != PROJECT_ROOT and (folder / f"{parts[0]}.py").is_file():
        return parts[1] in names_in(folder / f"{parts[0]}.py") | known
    return None


@cache
def names_in(path: Path) -> frozenset[str]:
    """What a module defines or imports at its top."""
    names = {n.name for n in tree_of(path).body if isinstance(n, (*FUNCTIONS, ast.ClassDef))}
    for node in tree_of(path).body:
        names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        names |= {a.asname or a.name for a in getattr(node, "names", ())}
    return frozenset(names)


@cache
def identifiers_of_yaml() -> frozenset[str]:
    """Keys of the configuration; some sections are called as rooms are."""
    text = "\n".join(p.read_text(encoding="utf-8") for p in PROJECT_ROOT.glob("configs/**/*.yaml"))
    return frozenset(re.findall(r"^\s*(\w+):", text, flags=re.MULTILINE))


@pytest.mark.parametrize("path", sorted({*SOURCES, *TESTS, *PAGES}), ids=shown)
def test_what_a_docstring_comment_or_page_names_exists(path: Path) -> None:
    stale = [
        f"{shown(path)}:{line}: `{said}`"
        for line, text in prose_of(path)
        for said in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
        if missing_name(said, path)
    ]
    assert not stale, "\n".join(stale)
