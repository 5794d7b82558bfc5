"""What breaks on Windows, found in the source without one: calls it lacks, encodings it guesses, names it refuses."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from prmd.artifacts.paths import PROJECT_ROOT

SOURCES = sorted(
    path
    for pattern in ("prmd/**/*.py", "[0-9]_*/*.py", "*.py", "benchmarks/**/*.py")
    for path in PROJECT_ROOT.glob(pattern)
)
UNIX_MODULES = {"fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog"}
UNIX_NAMES = {
    "os": {"fork", "forkpty", "symlink", "system", "uname", "getuid", "geteuid", "getgid", "killpg", "setsid"}
    | {"mkfifo", "chown", "nice", "getloadavg", "sched_getaffinity", "sync", "statvfs"},
    "signal": {
        "SIGKILL",
        "SIGHUP",
        "SIGALRM",
        "SIGUSR1",
        "SIGUSR2",
        "SIGQUIT",
        "alarm",
        "setitimer",
        "pause",
    },
    "time": {"tzset"},
}
BESIDE_A_CHECK = {
    "prmd/runtime.py: resource",
    "prmd/runtime.py: /proc/cpuinfo",
    "prmd/setup_check.py: /proc/driver/nvidia/gpus",
}
"""Used behind a look at the system, with another way for Windows."""
RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{n}" for name in ("com", "lpt") for n in range(1, 10))}
REFUSED = re.compile(r'[<>:"\\|?*\x00-\x1f]')


def shown(path: Path) -> str:
    return path.relative_to(PROJECT_ROOT).as_posix()


def faults_of(source: str) -> Iterator[str]:
    """What in a file's source would fail or change on Windows, in the order of `ast.walk`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.split(".")[0] in UNIX_MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in UNIX_MODULES:
                yield module
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if name in UNIX_NAMES.get(owner, ()):
                yield f"{owner}.{name}"
            case ast.Constant(value=str(text)) if re.match(r"/(tmp|dev|proc|etc|usr|var|home)(/|$)", text):
                yield text
            case ast.Call():
                yield from _faults_of_call(node)


def _faults_of_call(call: ast.Call) -> Iterator[str]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    keywords = {k.arg: k.value for k in call.keywords}
    if name in ("symlink_to", "hardlink_to", "mkfifo"):
        yield f"{name}: needs rights there"
    if name == "rename" and isinstance(call.func, ast.Attribute) and len(call.args) == 1:
        yield "rename: refuses an existing target there; use replace"
    if any(
        isinstance(value, ast.Constant) and value.value == "fork"
        for value in [*call.args, *keywords.values()]
    ):
        yield "fork"
    text_file = name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute)
    if text_file and ast.unparse(call.func).split(".")[0] != "io" and "encoding" not in keywords:
        yield f"{name}: the encoding is guessed there"
    if name == "open" and "encoding" not in keywords:
        is_builtin = isinstance(call.func, ast.Name)  # whose first argument is the file
        modes = [a.value for a in call.args[is_builtin:] if isinstance(a, ast.Constant)]
        texts = [m for m in modes if isinstance(m, str) and re.fullmatch(r"[rwaxt+]{1,3}", m)]
        if texts or (is_builtin and not modes):
            yield "open: the encoding is guessed there"
    reads_output = keywords.get("text") or keywords.get("universal_newlines")
    if reads_output is not None and not {"encoding", "errors"} & set(keywords):
        yield f"{name}(text=True): output that is not in the console's code page raises there"


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_nothing_that_windows_lacks(path: Path) -> None:
    found = {f"{shown(path)}: {fault}" for fault in faults_of(path.read_text(encoding="utf-8"))}
    assert not found - BESIDE_A_CHECK


@pytest.mark.parametrize(
    "line",
    [
        "import fcntl",
        "from resource import getrusage",
        "os.fork()",
        "os.kill(1, signal.SIGKILL)",
        "Path('a').rename('b')",
        "context = get_context('fork')",
        "Pool(start='fork')",
        "Path('a').read_text()",
        "Path('a').write_text('b')",
        "open('a')",
        "Path('a').open('w')",
        "subprocess.run(['a'], text=True)",
        "folder = '/tmp/scratch'",
        "link.symlink_to(target)",
    ],
)
def test_the_search_finds_each_kind(line: str) -> None:
    assert list(faults_of(line))


@pytest.mark.parametrize(
    "line",
    [
        "Path('a').replace('b')",
        "io.read_text(path)",
        "Path('a').read_text(encoding='utf-8')",
        "zipfile.Path('a').open('rb')",
        "open('a', 'rb')",
        "opener.open(request, timeout=3)",
        "frame.rename(columns={'a': 'b'})",
        "subprocess.run(['a'], text=True, encoding='utf-8')",
    ],
)
def test_what_works_there_is_left_alone(line: str) -> None:
    assert not list(faults_of(line))


def test_windows_can_check_out_every_file() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT_ROOT, capture_output=True, check=False)
    names = [name for name in listed.stdout.decode("utf-8").split("\0") if name]
    if not names:
        pytest.skip("not a git checkout")
    assert len({name.casefold() for name in names}) == len(names), "two names differ in case alone"
    for name in names:
        assert len(name) <= 150, f"{name}: with the user's own folder in front over Windows' 260 characters"
        for part in name.split("/"):
            assert not REFUSED.search(part) and part[-1] not in ". ", name
            assert part.split(".")[0].lower() not in RESERVED, name
