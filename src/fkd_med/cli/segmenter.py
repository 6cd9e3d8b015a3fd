"""A checkpoint made ready to segment images: the network, how images become its input, what its classes are called.

Everything comes out of the checkpoint; no configuration, teacher or training data is needed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fkd_med.checkpoints import read_checkpoint
from fkd_med.data.geometry import undo
from fkd_med.data.preprocessing import Preprocessing
from fkd_med.errors import ConfigError, DataError, FkdError, RunError
from fkd_med.foreign_files import refuse_non_finite
from fkd_med.modules import predict_classes
from fkd_med.modules.loading import refuse_newer
from fkd_med.modules.personal import PersonalTensors, merge
from fkd_med.networks import channels_last, forward_padded
from fkd_med.networks.spec import network_from_spec

_PREFIX = "network."
_AGAIN = "Use a checkpoint that `fkd fit` wrote: student.ckpt, or one in the run's checkpoints folder."


@dataclass
class Fitted:
    """One image, ready for the network.

    Attributes:
        image: Normalised, float32 (C, S, S).
        size: The original (H0, W0).
    """

    image: Tensor
    size: tuple[int, int]


class Segmenter:
    """Segments images with the network of a checkpoint.

    Args:
        path: Any checkpoint of ours.
        device: ``cpu`` or ``cuda``.
        trusted_packages: Packages the checkpoint may name a network of, beside the usual ones.

    Raises:
        RunError: The file is missing or damaged, does not describe its network, or its network cannot be rebuilt.
    """

    def __init__(self, path: Path, device: str = "cpu", trusted_packages: Sequence[str] = ()) -> None:
        checkpoint = read_checkpoint(path)
        described = _description(checkpoint, path)
        self.path = path
        self.device = torch.device(device)
        self.preprocessing, self.values = _preprocessing(described["preprocessing"], path)
        self._shared: dict[str, Tensor] = checkpoint["state_dict"]
        self.network: nn.Module = _rebuilt(described["network"], trusted_packages, self._shared, path)
        self._personal = PersonalTensors(self.network)
        try:
            self._personal.load_state_dict(described.get("personal") or {})
        except (AttributeError, TypeError, ValueError) as error:
            raise RunError(f"{path}: the clients' own tensors cannot be read ({error}). {_AGAIN}") from error
        if not self.clients:
            self._load(self._shared)

    @property
    def clients(self) -> list[str]:
        """The clients with tensors of their own in the checkpoint; none when one network serves all."""
        return sorted(self._personal.by_client)

    def enter(self, client: str | None) -> None:
        """Take the network of one client.

        Raises:
            RunError: The checkpoint holds a network per client, and this is none of them.
        """
        if not self.clients:
            return
        if client is None or client not in self.clients:
            close = difflib.get_close_matches(client or "", self.clients, n=1)
            asked = "choose one with --client" if client is None else f"{client!r} is none of them"
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise RunError(f"{self.path} holds a network for each of {', '.join(self.clients)}: {asked}{hint}")
        self._load(merge(self._shared, self._personal.of(client)))

    def read(self, path: Path) -> Fitted:
        """Read one image and bring it to the network's size; DataError if it cannot be read."""
        image, size = self.preprocessing.read(path)
        return Fitted(self.preprocessing.tensor(image), size)

    def segment(self, images: Sequence[Fitted]) -> list[NDArray[np.uint8]]:
        """Return the class index of every pixel of each image, (H0, W0), at the image's own size.

        Raises:
            ConfigError: The device has too little memory for the batch.
        """
        batch = torch.stack([fitted.image for fitted in images]).to(self.device)
        try:
            with torch.inference_mode():
                logits = forward_padded(self.network, batch).float()
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"The device has too little memory for {len(images)} images at once: give a smaller --batch_size."
            ) from error
        if max(logits.shape[1], 2) != len(self.values):
            raise RunError(
                f"{self.path}: the network has {logits.shape[1]} output channels for {len(self.values)} mask values. "
                f"The checkpoint is damaged. {_AGAIN}"
            )
        return [self._restored(maps.cpu(), fitted.size) for maps, fitted in zip(logits, images, strict=True)]

    def mask(self, indices: NDArray[np.uint8]) -> NDArray[Any]:
        """Return class indices as raw mask values of the training set, 8 bit where they fit, else 16."""
        table = np.asarray(self.values, dtype=np.uint8 if max(self.values) < 256 else np.uint16)
        return np.asarray(table[indices])

    def _restored(self, maps: Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
        restored = undo(maps, size, self.preprocessing.resize)
        return predict_classes(restored[None])[0].numpy().astype(np.uint8)

    def _load(self, state: Mapping[str, Tensor]) -> None:
        refuse_non_finite(state, f"The network in {self.path}")
        own = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
        try:
            self.network.load_state_dict(own)
        except RuntimeError as error:
            first = [line.strip() for line in str(error).splitlines()[1:2]]
            raise RunError(
                f"{self.path}: the weights do not belong to the network it describes, {type(self.network).__name__} "
                f"({''.join(first)[:200]}). Install the version of its package that it was trained with."
            ) from error
        self.network = channels_last(self.network).to(self.device).eval()


def choose_device(name: str) -> str:
    """Return ``cpu`` or ``cuda`` for ``auto``, ``cpu`` or ``cuda``; ConfigError for a GPU that is not there."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("--device cuda: no CUDA GPU can be used here. Leave --device out, or give cpu.")
    return "cuda" if available and name != "cpu" else "cpu"


def _description(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return what our modules add to a checkpoint."""
    described = checkpoint.get("fkd_med")
    if not isinstance(described, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise RunError(f"{path} does not say which network it holds: it is no checkpoint of fkd-med. {_AGAIN}")
    refuse_newer(described, f"{path}")
    if described.get("network") is None:
        raise RunError(
            f"{path} does not describe its network, because the module was built in Python and not from a "
            "configuration. Train it by `fkd fit` with the network's class_path under model.network; or load it in "
            "Python: SegmentationModule.load_from_checkpoint(path, network=...)."
        )
    if described.get("preprocessing") is None:
        raise RunError(
            f"{path} does not say how images were prepared, because it was trained without a FederatedDataModule. "
            "Train with one, or predict in Python."
        )
    return described


def _rebuilt(spec: Any, trusted: Sequence[str], state: Mapping[str, Any], path: Path) -> nn.Module:
    """Build the network of a checkpoint, after seeing on paper that it is not larger than its weights."""
    try:
        with torch.device("meta"):
            sketch: nn.Module | None = network_from_spec(spec, trusted)
    except RunError:  # some networks cannot be made on paper; a wrong one says so again below
        sketch = None
    held = sum(tensor.numel() for tensor in state.values() if isinstance(tensor, Tensor))
    if sketch is not None and (wanted := sum(t.numel() for t in sketch.state_dict().values())) > 2 * held:
        raise RunError(f"{path} describes a network of {wanted:,} numbers and holds {held:,}. {_AGAIN}")
    try:
        return network_from_spec(spec, trusted)
    except RunError as error:
        raise RunError(f"{path}: {error}") from error


def _preprocessing(info: Any, path: Path) -> tuple[Preprocessing, tuple[int, ...]]:
    """Return how images are prepared, and the raw mask value of each class."""
    try:
        preprocessing = Preprocessing.of(info)
        number = max(int(info["classes"]), 2)
        default = (0, 255) if number == 2 else range(number)
        values = tuple(int(value) for value in info.get("class_values") or default)
        if len(values) != number or not all(0 <= value <= 65535 for value in values):
            raise ValueError(f"classes {number}, values {values}")
    except (KeyError, TypeError, ValueError, AttributeError, FkdError) as error:
        raise RunError(f"{path}: its preprocessing cannot be used ({error}). {_AGAIN}") from error
    return preprocessing, values


def read_or_fault(segmenter: Segmenter, path: Path) -> Fitted | DataError:
    """Read one image, returning what is wrong with it instead of raising it."""
    try:
        return segmenter.read(path)
    except DataError as error:
        return error
