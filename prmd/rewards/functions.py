"""Functions of the user's that reward responses: loaded from the file that the configuration names, and called with care.

Code runs here only where `data.own_pairs.allow_code` is true, which the configuration has refused before where it is not.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import SourceLoader
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from prmd.artifacts import io
from prmd.artifacts.paths import resolve_user_path
from prmd.errors import ConfigError, DataError, NotFiniteError
from prmd.pairs import Message

_LARGEST = 3e38
"""Rewards are kept as float32."""


@dataclass(frozen=True)
class RewardFunction:
    """A function `(prompt, response) -> number` of the user's.

    Attributes:
        name: as the configuration names it, `my_rewards.py:concise`.
        sha256: of its file.
        call: the function itself.
    """

    name: str
    sha256: str
    call: Callable[[list[Message], str], Any]

    @property
    def fingerprint(self) -> str:
        """Key of what its rewards depend on: the content of its file and the function's name."""
        return io.fingerprint(["reward function", self.name.rpartition(":")[2], self.sha256])

    def __call__(self, prompt: Sequence[Message], response: str, where: str) -> float:
        """The reward of a response.

        Args:
            prompt: handed over as a copy of its own.
            where: which response this is, for messages.

        Raises:
            DataError: the function raises, or returns what is no number.
            NotFiniteError: it returns NaN or infinity.
        """
        try:
            value = self.call([dict(message) for message in prompt], response)
        except (Exception, SystemExit) as error:
            raise DataError(
                f"{self.name}: raised {_said(error)} for {where}; mend the function, it has to reward every response"
            ) from error
        if isinstance(value, bool) or not isinstance(value, Real):
            raise DataError(
                f"{self.name}: returned {value!r:.60} ({type(value).__name__}) for {where}, wanted a number; return float(...)"
            )
        if not abs(value) <= _LARGEST:  # NaN too
            raise NotFiniteError(
                f"{self.name}: returned {value} for {where}, wanted a finite number; mend the function"
            )
        return float(value)


class _Source(SourceLoader):
    """Runs the bytes that were hashed, whatever becomes of the file meanwhile, and leaves no compiled copy beside it."""

    def __init__(self, path: Path, content: bytes) -> None:
        self._path, self._content = path, content

    def get_filename(self, fullname: str) -> str:
        return str(self._path)

    def get_data(self, path: str | bytes) -> bytes:
        return self._content


def load_function(name: str, key: str) -> RewardFunction:
    """Import the file that `name` begins with, and return the function it ends with.

    Args:
        name: `my_rewards.py:concise`; a relative path means what `resolve_user_path` says.
        key: of the configuration, for messages.

    Raises:
        ConfigError: there is no such file, it cannot be imported, or it has no such function.
    """
    text, _, function = name.rpartition(":")
    path = resolve_user_path(text, key, "a Python file", "file").resolve()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error.strerror}); correct the path") from error
    module = _imported(path, content, key)
    found = getattr(module, function, None)
    if not callable(found):
        known = [k for k, value in vars(module).items() if callable(value) and not k.startswith("_")]
        raise ConfigError(
            f"{key}: {path} has no function {function!r}; its functions are: {', '.join(known) or 'none'}"
        )
    return RewardFunction(name, hashlib.sha256(content).hexdigest(), found)


def _imported(path: Path, content: bytes, key: str) -> ModuleType:
    """The module of a file; the same one again where it was imported before with this content."""
    name = f"brought_rewards_{io.fingerprint([str(path), hashlib.sha256(content).hexdigest()])}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # where dataclasses and pickles look it up
    try:
        _Source(path, content).exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"{key}: importing {path} raised {_said(error)}; mend that file") from error
    return module


def _said(error: BaseException) -> str:
    """`ZeroDivisionError (division by zero)` on one line."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__} ({text})" if text else type(error).__name__
