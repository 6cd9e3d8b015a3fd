"""Turns what goes wrong into one clear message and an exit code."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentError

from fkd_med.cli.processes import LostProcessError, lost_process, rank
from fkd_med.cli.signals import TERMINATED, interruption
from fkd_med.cli.wrong_values import wrong_value
from fkd_med.errors import ConfigError, FkdError

_NETWORK = (
    "URLError",
    "LocalEntryNotFoundError",
    "ConnectError",
    "ConnectionError",
    "gaierror",
    "OfflineModeIsEnabled",
)


@dataclass
class Outcome:
    """The exit code of a command."""

    code: int = 0


@contextmanager
def explained(arguments: list[str], debug: bool) -> Iterator[Outcome]:
    """Run the block, print what goes wrong in it as one message, and note the exit code.

    Args:
        arguments: the command line, for hints.
        debug: show the traceback too.
    """
    outcome = Outcome()
    try:
        yield outcome
    except FkdError as error:
        outcome.code = error.exit_code
        _print(str(error), debug)
    except ArgumentError as error:
        outcome.code = 2
        _print(explain_arguments(str(error)), debug)
    except (SystemExit, KeyboardInterrupt) as error:
        code = interruption(error)
        if code is None:
            assert isinstance(error, SystemExit)
            outcome.code = error.code if isinstance(error.code, int) else int(error.code is not None)
            return
        outcome.code = code
        advice = " Run the same command again: with `--ckpt_path last` once a round (or epoch) was closed."
        word = "Terminated" if code == TERMINATED else "Interrupted"
        print(f"\n{word}." + (advice if arguments[0] == "fit" else ""), file=sys.stderr)
    except Exception as error:
        outcome.code = 1
        cause = user_error(error)
        if cause is not None:
            outcome.code = cause.exit_code
            if not (isinstance(cause, LostProcessError) and rank() > 0):  # said once, by the first process
                _print(str(cause), debug)
            return
        _print(
            f"unexpected {type(error).__name__}: {error}\n"
            f"Run it again with --debug for the traceback, and report it if it is not yours: fkd {' '.join(arguments)}",
            debug,
        )


def _print(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    who = f" (process {rank()})" if rank() > 0 else ""
    print(f"fkd: error{who}: {message}", file=sys.stderr)


def user_error(error: BaseException) -> FkdError | None:
    """Find a user's error behind another one, or recognise one that a library raised."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, FkdError):
            return seen
        if type(seen).__name__ in _NETWORK:
            return ConfigError(
                "Pretrained weights were asked for and cannot be downloaded: there is no network, or no cached copy. "
                "Set encoder_weights: null (segmentation-models-pytorch) or pretrained: false (timm, TransUNet) to "
                "train from scratch, download them once where there is a network, or give a file of weights to "
                f"fkd_med.networks.PretrainedUNet. ({seen})"
            )
        if type(seen).__name__ == "MisconfigurationException":
            return ConfigError(str(seen))
        if (lost := lost_process(seen)) is not None:
            return lost
        seen = seen.__cause__ or seen.__context__
    return None


def explain_arguments(text: str) -> str:
    """Make a parser's message readable, and name the nearest key or class for one that is unknown."""
    unknown = _unknown_key(text)
    if unknown is None:
        message, name = wrong_value(text) or (text.strip(), "")
        return message + (_nearest(name) if name else "")
    where = ".".join(re.findall(r"[Pp]arser key ['\"]([\w.]+)['\"]", text))
    key = f"{where}.{unknown}" if where and "class_path" not in text else unknown
    in_place = f" (in {where})" if where and key == unknown else ""
    hint = _nearest(unknown)
    return f"{key!r} is unknown{in_place}.{hint}"


def _nearest(unknown: str) -> str:
    """Name the words that an unknown key or class may have been meant to be."""
    owners = _owners(unknown)
    if owners:
        return f" It is a setting of {' and '.join(owners)}: give it there, or leave it out."
    words = _vocabulary()
    for part in (unknown.split(".")[0], unknown.split(".")[-1]):
        if part not in words:
            close = difflib.get_close_matches(part, words, n=3, cutoff=0.6)
            if close:
                return f" Did you mean {' or '.join(close)}?"
    return " `fkd COMMAND --help` and docs/configuration.md list what there is."


def _unknown_key(text: str) -> str | None:
    patterns = (
        r"[Kk]ey ['\"]([\w.+-]+)['\"] is not expected",
        r"Option ['\"]([\w.+-]+)['\"] is not accepted",
        r"No action for (?:destination )?key ['\"]([\w.+-]+)['\"]",
        r"[Uu]nrecognized arguments?: --([\w.+-]+)",
        r"Import of path ['\"]?([\w.]+)",
        r"[Uu]nexpected import path format:? ['\"]?([\w.]+)",
        r"No module named ['\"]([\w.]+)['\"]",
        r"has no attribute ['\"]([\w.]+)['\"]",
        r"Group '[\w.]*' does not accept (?:nested key|option)s? ['\"]([\w.+-]+)['\"]",
        r"does not accept (?:nested key|option) ['\"]([\w.+-]+)['\"]",
    )
    for pattern in patterns:
        match = re.search(pattern, text)
        if match:
            return match.group(1)
    return None


def _classes() -> list[Any]:
    """Return the classes of ours that a configuration may name."""
    from fkd_med import aggregation, data, federated, losses, modules, networks, study, tracking

    packages = (aggregation, data, federated, losses, modules, networks, study, tracking)
    found = [getattr(package, name) for package in packages for name in package.__all__]
    return [cls for cls in found if inspect.isclass(cls)]


def _owners(key: str) -> list[str]:
    """Return the classes of ours, at most three, that have a setting of this very name."""
    found = [cls.__name__ for cls in _classes() if key in inspect.signature(cls.__init__).parameters]
    return sorted(set(found))[:3]


def _vocabulary() -> list[str]:
    """Return the keys and classes a configuration may name."""
    import lightning as L
    import segmentation_models_pytorch as smp

    classes = _classes()
    architectures = [cls for cls in vars(smp).values() if inspect.isclass(cls)]
    words = {"model", "data", "trainer", "federation", "run_dir", "overwrite", "test_after_fit", "checkpoint"}
    words |= {"seed_everything", "ckpt_path", "config", "class_path", "init_args", "resume", "allow"}
    for cls in (*classes, L.Trainer, *architectures):
        words.add(cls.__name__)
        words |= set(inspect.signature(cls.__init__).parameters)
    return sorted(words - {"self", "args", "kwargs"})
