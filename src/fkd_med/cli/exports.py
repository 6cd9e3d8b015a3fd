"""The files that `fkd predict` takes: students, and teachers that have trained on in a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
from torch import Tensor

from fkd_med.checkpoints import write_checkpoint
from fkd_med.modules import MutualDistillationModule, SegmentationModule, TeacherSource
from fkd_med.modules.personal import merge
from fkd_med.modules.settings import teacher_configuration
from fkd_med.rundir import RunDir


def export_students(model: SegmentationModule, run_dir: RunDir, hospitals: Iterable[str]) -> None:
    """Write student.ckpt of the module's weights; one per client where clients keep students, or parts of them.

    Args:
        model: holds the weights, and what its clients keep.
        run_dir: the run's folder.
        hospitals: all clients of the run.
    """
    shared = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    if not model.personal.by_client:
        write_checkpoint(_exported(model, shared), run_dir.student)
        return
    alone = model.personal.are_students  # otherwise a client that never took part has the shared tensors
    for client in model.personal.by_client if alone else hospitals:
        folder = run_dir.client(client)
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(_exported(model, merge(shared, model.personal.of(client))), folder / "student.ckpt")


def export_teachers(
    model: MutualDistillationModule, source: TeacherSource, run_dir: RunDir, clients: Iterable[str | None]
) -> None:
    """Write teacher.ckpt of each client's teacher that has trained beside the student; frozen ones are in the store.

    Args:
        model: the module, whose preprocessing the teachers share.
        source: gives the teachers as they are after the run.
        run_dir: the run's folder.
        clients: the clients; ``None`` is a run without a federation.
    """
    network = (teacher_configuration(model) or {}).get("init_args", {}).get("network")
    for client in clients:
        state = {f"network.{name}": tensor.cpu() for name, tensor in source.load(client).state_dict().items()}
        folder = run_dir.client(client) if client else run_dir.path
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(_exported(model, state, network), folder / "teacher.ckpt")


def _exported(model: SegmentationModule, state: Mapping[str, Tensor], network: Any = None) -> dict[str, Any]:
    described = model.export()
    return {
        "state_dict": {name: tensor.contiguous() for name, tensor in state.items()},
        "pytorch-lightning_version": L.__version__,
        "epoch": model.clock.round,
        "global_step": model.clock.round,
        "fkd_med": described if network is None else {**described, "network": network},
    }
