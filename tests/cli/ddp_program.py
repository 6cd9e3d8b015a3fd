"""``fkd`` in several processes, one of which may come to grief; run by test_ddp_command.py, never imported.

The environment says what happens: ``TROUBLE`` is ``rank:call:action``, where the action is ``raise``, a signal, or
``group-`` and a signal (to all processes, as Ctrl-C does), at an optimizer step of a client. Each process appends its
PID to the file ``PIDS``, and all but the first what they write below the current folder to the file ``WRITTEN``. If
there is an ``IMAGES``, each image that is trained on is noted there: rank, round, epoch, client, id.
"""

import os
import signal
import sys
from typing import Any

RANK = os.environ.get("LOCAL_RANK", "0")


def note(file: str, text: object) -> None:
    descriptor = os.open(os.environ[file], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{text}\n".encode())
    os.close(descriptor)


def spy(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
    changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
    if (writes or changes) and os.path.abspath(str(arguments[0])).startswith(os.getcwd() + os.sep):
        note("WRITTEN", f"{event} {arguments[0]}")


def install(rank: str, call: str, action: str) -> None:
    from fkd_med.federated.client import LearningRateNote

    if rank != RANK:
        return
    original, calls = LearningRateNote.on_before_optimizer_step, 0

    def replaced(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == int(call) and action == "raise":
            raise RuntimeError("trouble on purpose")
        if calls == int(call) and action.startswith("group-"):
            os.killpg(0, signal.Signals[action.removeprefix("group-")])
        elif calls == int(call):
            os.kill(os.getpid(), signal.Signals[action])
        original(*args)

    LearningRateNote.on_before_optimizer_step = replaced  # type: ignore[method-assign]


def note_images() -> None:
    from fkd_med.modules import SegmentationModule

    original = SegmentationModule.training_step

    def replaced(self: Any, batch: dict[str, Any], batch_idx: int) -> Any:
        for client, image in zip(batch["client"], batch["id"], strict=True):
            note("IMAGES", f"{RANK},{self.clock.round},{self.trainer.current_epoch},{client},{image}")
        return original(self, batch, batch_idx)

    SegmentationModule.training_step = replaced  # type: ignore[method-assign]


if __name__ == "__main__":
    note("PIDS", os.getpid())
    if RANK != "0":
        sys.addaudithook(spy)
    if "TROUBLE" in os.environ:
        install(*os.environ["TROUBLE"].split(":"))
    if "IMAGES" in os.environ:
        note_images()
    from fkd_med.cli import main

    sys.exit(main())
