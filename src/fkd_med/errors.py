"""Errors a user can act on: each message names the file, client or key, and the remedy.

`fkd` prints them without a traceback (``--debug`` shows it) and exits with `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FkdError(Exception):
    """Anything the user can repair; the message says what and how."""

    exit_code = 2


class DataError(FkdError):
    """Images, masks, manifests or partitions that cannot be used."""


class ConfigError(FkdError):
    """A configuration that cannot be run."""


class RunError(FkdError):
    """A run directory, checkpoint or teacher store that cannot be used."""


class TrainingError(FkdError):
    """Training that cannot go on: a diverged loss, a failed client, a lost quorum."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def single_value(error: BaseException, network: str = "A network of this run") -> ConfigError | None:
    """Return what to tell of torch's error about BatchNorm's only value; None for other errors."""
    if "Expected more than 1 value per channel when training" not in str(error):
        return None
    return ConfigError(
        f"{network} cannot be trained on one image at a time: BatchNorm needs more than one value per channel. "
        "Set data.batch_size to 2 or more, or a larger data.image_size."
    )


def check_known(where: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a name that is not known, naming the nearest; ConfigError."""
    known = list(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{where}: there is no {name!r}.{hint} There are {', '.join(known) or 'none'}.")
