"""The dry pass before the first step: do all taps exist, and can every term compare what it gets?

A wrong tap or an unfit pair of maps is found before any teacher trains, on one image, with untrained networks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fkd_med.distillation.matching import match
from fkd_med.distillation.taps import Taps, find_module
from fkd_med.errors import ConfigError
from fkd_med.losses import LOGITS, DistillationTerm, Pixels
from fkd_med.networks.eval_mode import evaluating


def rehearse(
    student: nn.Module, teacher: nn.Module, terms: Mapping[str, DistillationTerm], image: Tensor
) -> dict[str, nn.Module]:
    """Run both networks on one image and every term on what they return; change nothing.

    Args:
        student: the student network.
        teacher: a network of the teacher's architecture; it need not be trained.
        terms: the terms by name.
        image: one image (1, C, H, W).

    Returns:
        For each term that has a connector, its layer from the student's channels to the teacher's.

    Raises:
        ConfigError: names the term and what is wrong: a tap that does not exist (with the nearest modules), or maps
            that cannot be compared (with both taps and shapes).
    """
    for name, term in terms.items():
        for side, network, tap in (("student", student, term.student_tap), ("teacher", teacher, term.teacher_tap)):
            if tap != LOGITS:
                find_module(network, tap, f"model.losses.{name}.{side}_tap: the {side} {_name(network)}")
    shown = {
        "student": _look(student, [t.student_tap for t in terms.values()], f"the student {_name(student)}", image),
        "teacher": _look(teacher, [t.teacher_tap for t in terms.values()], f"the teacher {_name(teacher)}", image),
    }
    _check_classes(shown["student"][LOGITS], shown["teacher"][LOGITS])
    connectors: dict[str, nn.Module] = {}
    for name, term in terms.items():
        ours, theirs = shown["student"][term.student_tap], shown["teacher"][term.teacher_tap]
        if term.connector is not None:
            connectors[name] = term.connector(ours.shape[1], theirs.shape[1])
        tried = copy.deepcopy(connectors[name]).eval() if name in connectors else None  # its statistics stay
        _try(name, term, ours, theirs, shown["student"][LOGITS].shape[1], image, tried)
    return connectors


def sample_image(data: Any) -> Tensor | None:
    """Return one image (1, C, H, W) of a data module with clients, not augmented; None if it has none to show."""
    if not hasattr(data, "client_names"):
        return None
    client = data.client_names()[0]
    for loader in (data.client_val_dataloader(client), data.client_train_dataloader(client, -1)):
        if len(loader.dataset):
            image: Tensor = loader.dataset[0]["image"][None]
            return image
    return None


@torch.no_grad()
def _try(
    name: str, term: DistillationTerm, ours: Tensor, theirs: Tensor, classes: int, image: Tensor,
    connector: nn.Module | None,
) -> None:  # fmt: skip
    pixels = Pixels(torch.zeros(1, *image.shape[-2:], dtype=torch.long), max(2, classes))
    try:
        term(*match(term, ours, theirs, pixels, None, connector))
    except Exception as error:  # a connector of the user's own may fail in any way
        hint = ""
        if ours.shape[1] != theirs.shape[1] and connector is None and term.student_tap != LOGITS:
            hint = " Channels differ: `connector: fkd_med.losses.pointwise` brings the student's to the teacher's."
        why = str(error).rstrip(".")
        raise ConfigError(
            f"model.losses.{name} ({type(term).__name__}) cannot compare the student's {term.student_tap} "
            f"{tuple(ours.shape)} with the teacher's {term.teacher_tap} {tuple(theirs.shape)}: {why}.{hint}"
        ) from error


def _look(network: nn.Module, paths: list[str], whose: str, image: Tensor) -> dict[str, Tensor]:
    """Return the maps of one image on the CPU, from a network in eval mode, where its layers lie."""
    device = next((p.device for p in network.parameters()), image.device)
    taps = Taps(network, paths, whose)
    try:
        with evaluating(network), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return {tap: maps.float().cpu() for tap, maps in taps(image.to(device)).items()}
    except ConfigError:
        raise
    except Exception as error:  # networks complain in their own ways
        raise ConfigError(f"{whose} cannot take images of shape {tuple(image.shape)}: {error}") from error
    finally:
        taps.remove()


def _check_classes(student: Tensor, teacher: Tensor) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise ConfigError(
            f"The teacher has {teacher.shape[1]} output channels and the student {student.shape[1]}: "
            "give both networks the same `classes`."
        )


def _name(network: nn.Module) -> str:
    return type(getattr(network, "_orig_mod", network)).__name__
