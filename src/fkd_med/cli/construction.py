"""Builds what a configuration names: a class that refuses its settings is an error of the user's, in one line.

Of a constructor's own exception the parser would make a report of all values it was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fkd_med.cli.messages import user_error
from fkd_med.errors import ConfigError, first_line


def construct(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Return an object of a class that a configuration names, built from its init_args.

    Raises:
        ConfigError: the class refuses them; names it, with its own words.
    """
    words = [name for name, value in kwargs.items() if isinstance(value, str) and value == "None"]
    null = f" On the command line null becomes the word None: write `{words[0]}: null` in a file." if words else ""
    with refusals(f"{cls.__module__}.{cls.__qualname__}", null):
        return cls(*args, **kwargs)


@contextmanager
def refusals(what: str, hint: str = "") -> Iterator[None]:
    """Turn what a constructor in the block raises, unless its message is clear already, into a `ConfigError`.

    Args:
        what: what cannot be built.
        hint: another sentence for the message.
    """
    try:
        yield
    except Exception as error:
        if user_error(error) is not None:
            raise
        cause = _behind(error)
        said = f"{type(cause).__name__}: {first_line(cause)}"
        raise ConfigError(
            f"{what} cannot be built ({said}). Correct its settings; --debug shows where it failed.{hint}"
        ) from error


def _behind(error: BaseException) -> BaseException:
    """Return the error that the parser reports as one of a union of types."""
    while str(error).startswith("Does not validate") and error.__cause__ is not None:
        error = error.__cause__
    return error
