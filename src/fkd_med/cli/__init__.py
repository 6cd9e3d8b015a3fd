"""`fkd`: the command line. ``main(argv)`` returns an exit code and prints errors a user can act on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

# Before the stack is imported: no look-up of new versions over the network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

USAGE = """usage: fkd COMMAND [options]

Federated distillation for medical image segmentation: simulated hospitals train one tiny student together.

  fit          train: a federation of hospitals, or one network on pooled data
  validate     score a checkpoint on every hospital's validation images
  test         score a checkpoint on every hospital's test images, at their original size
  predict      segment new images with a student.ckpt (or any checkpoint)
  teachers     train the hospitals' teachers of a configuration, and nothing else
  compare      put finished runs side by side, with intervals and plots
  reproduce    run a study: arms, data sets, teachers and seeds, and its tables
  check-data   look at a data set before a long run
  phantoms     write a synthetic data set to try things on

Begin with:  fkd fit --config configs/quickstart.yaml
Help on one command:  fkd COMMAND --help;  with --debug an error shows its traceback.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 is success, 1 an unexpected error, 2 wrong input or configuration, 3 a training that could not go on,
    130 an interruption by the user (Ctrl-C), 143 one by the system (SIGTERM).

    Args:
        argv: the arguments after the program's name; those of this process when left out.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"fkd-med {version('fkd-med')}")
        return 0
    from fkd_med.cli.configuration_files import check_configurations, with_own_configuration
    from fkd_med.cli.messages import explained
    from fkd_med.cli.processes import attached
    from fkd_med.cli.signals import terminable

    with terminable(), attached(), explained(arguments, debug) as outcome:
        run = _command(arguments[0])
        options = arguments[1:]
        if arguments[0] in ("validate", "test"):
            options = with_own_configuration(options)
        if arguments[0] != "predict":  # which looks at its other arguments first
            check_configurations(options)
        run(options)
    return outcome.code


def entry_point() -> None:
    """Run `main` for the console script."""
    sys.exit(main())


COMMANDS = ("fit", "validate", "test", "predict", "teachers", "compare", "reproduce", "check-data", "phantoms")


def _command(name: str) -> Callable[[list[str]], None]:
    """Return what runs a command; imports only what that command needs."""
    if name not in COMMANDS:
        import difflib

        from fkd_med.errors import ConfigError

        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean `fkd {close[0]}`?" if close else " `fkd --help` lists them."
        raise ConfigError(f"There is no command {name!r}.{hint}")
    if name == "predict":
        from fkd_med.cli.predict import predict

        return predict
    if name == "compare":
        from fkd_med.cli.compare import compare

        return compare
    if name == "reproduce":
        from fkd_med.cli.reproduce import reproduce

        return reproduce
    if name == "phantoms":
        from fkd_med.cli.phantoms import phantoms

        return phantoms
    if name == "check-data":
        from fkd_med.cli.check_data import check_data

        return check_data
    from fkd_med.cli.lightning import run_lightning

    return lambda arguments: run_lightning(name, arguments)
