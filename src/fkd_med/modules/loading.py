"""Whether a checkpoint belongs to a module, said before torch is given its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fkd_med.errors import RunError
from fkd_med.foreign_files import refuse_non_finite

VERSION = 1
"""Of what our modules add to a checkpoint; raise it when an older program could not read it."""


def described(checkpoint: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """Return what our modules added to a checkpoint, after seeing that its weights are `module`'s.

    Raises:
        RunError: it is of a newer version, of another network, or has NaN or infinity in its weights.
    """
    file = getattr(getattr(module, "_trainer", None), "ckpt_path", None)
    what = f"The checkpoint {file}" if file else "The checkpoint"
    ours = checkpoint.get("fkd_med", {})
    if not isinstance(ours, Mapping) or not isinstance(ours.get("round", 0), int):
        raise RunError(f"{what} has a damaged description of its network. Give another one, or start afresh.")
    refuse_newer(ours, what)
    _refuse_rounds(checkpoint, module, what)
    _refuse_other_network(checkpoint.get("state_dict"), module, what)
    refuse_non_finite(checkpoint["state_dict"], what)
    return ours


def refuse_newer(ours: Mapping[str, Any], what: str) -> None:
    """Refuse what a later fkd-med wrote in a way that this one does not know.

    Raises:
        RunError: names both versions.
    """
    version = ours.get("version", VERSION)
    if not isinstance(version, int) or version > VERSION:
        raise RunError(f"{what} is of version {version!r:.40} and this fkd-med reads {VERSION}: install a newer one.")


def _refuse_rounds(checkpoint: Mapping[str, Any], module: nn.Module, what: str) -> None:
    """Refuse to go on with the rounds of a federation as epochs of a plain training: optimizers are the clients'."""
    trainer = getattr(module, "_trainer", None)
    if trainer is None or trainer.state.fn != "fit" or getattr(trainer, "federation", None) is not None:
        return
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    if "federation" in loop.get("state_dict", {}):
        raise RunError(
            f"{what} closes a round of a federation, and this configuration has no federation: resume it with the "
            "run's own config.yaml, or start without --ckpt_path."
        )


def _refuse_other_network(state: Any, module: nn.Module, what: str) -> None:
    if not isinstance(state, Mapping):
        raise RunError(f"{what} holds no weights: it is damaged or not from fkd-med. Give another one.")
    wanted: dict[str, Tensor] = module.state_dict()
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(map(str, state.keys() - wanted.keys()))
    shapes = [
        f"{name} is {tuple(getattr(state[name], 'shape', ()))} there and {tuple(wanted[name].shape)} here"
        for name in sorted(wanted.keys() & state.keys())
        if getattr(state[name], "shape", None) != wanted[name].shape
    ]
    if missing or unknown or shapes:
        lists = f"missing {', '.join(missing[:3]) or 'nothing'}, unknown {', '.join(unknown[:3]) or 'nothing'}"
        raise RunError(
            f"{what} is of another network than model.network: {shapes[0] if shapes else lists}. Use the "
            "configuration it was trained with (config.yaml of its run), or give another checkpoint."
        )
