"""Turns what goes wrong into one clear message and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jsonargparse import ArgumentError

from fkd_med.cli.processes import LostProcessError, lost_process, rank
from fkd_med.cli.signals import TERMINATED, interruption
from fkd_med.cli.unknown_keys import nearest, unknown_key
from fkd_med.cli.wrong_classes import missing_model, wrong_class
from fkd_med.cli.wrong_values import wrong_value
from fkd_med.errors import ConfigError, FkdError, single_value

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
        if (single := single_value(seen)) is not None:
            return single
        seen = seen.__cause__ or seen.__context__
    return None


def explain_arguments(text: str) -> str:
    """Make a parser's message readable, and name the nearest key or class for one that is unknown."""
    explained = missing_model(text) or unknown_key(text) or wrong_class(text)
    if explained is not None:
        return explained
    message, name = wrong_value(text) or (text.strip(), "")
    return message + (nearest(name) if name else "")
