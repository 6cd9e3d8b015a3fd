"""Each client's big teacher, trained once on its own images and kept where several runs can share it."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save
from torch import Tensor, nn

from fkd_med.checkpoints import LastCheckpoint, SafeCheckpointIO
from fkd_med.errors import ConfigError
from fkd_med.federated.client_data import ClientData
from fkd_med.federated.inner import inner_trainer, is_trial, release
from fkd_med.federated.progress import LossOnBar, Reporter
from fkd_med.federated.quiet import quiet
from fkd_med.federated.teacher_curve import TeacherCurve
from fkd_med.federated.teacher_files import TeacherReader, is_whole, read_teacher
from fkd_med.federated.teacher_key import teacher_key
from fkd_med.files import atomic_write_bytes, atomic_write_text
from fkd_med.locks import is_queued, queued
from fkd_med.modules import SegmentationModule, TeacherSource, check_fits
from fkd_med.ranks import as_first_rank_says, is_first_rank
from fkd_med.seeding import SeedEpochs, global_seed, seeded

POOLED = "all-clients"


class TeacherStage(TeacherSource):
    """Trains one teacher per client, once, and keeps it in a store that several runs share.

    A teacher is found again by a key: the client's images, the module's whole configuration, the seed, the
    preprocessing, the precision and the network's tensors; never by devices or paths.

    Args:
        module: how a teacher is trained; each client trains a copy of it.
        epochs: epochs over the client's training images; the weights of the best validation Dice are kept. 0 gives
            the network as `module` has it, untrained but for pretrained weights, for mutual distillation.
        store: folder of the teachers, outside the run directory.
        checkpoints: teachers you bring, by client; Lightning checkpoints, state dicts or safetensors files.
    """

    def __init__(
        self,
        module: SegmentationModule,
        epochs: int = 50,
        store: str = "teachers",
        checkpoints: dict[str, str] | None = None,
    ) -> None:
        if epochs < 0:
            raise ConfigError(f"The teacher's epochs are {epochs}: give 1 or more, or 0 for mutual distillation.")
        self.module = module
        self.epochs = epochs
        self.store = Path(store)
        self.checkpoints = {client: Path(path) for client, path in (checkpoints or {}).items()}
        self.files: dict[str, Path] = {}
        self._reader = TeacherReader()
        self._fitting: set[str] = set()  # clients whose checkpoint has been read, and fits

    def ensure(self, client: str | None, data: Any, **options: Any) -> Path:
        """Return a client's teacher, from the store or the checkpoints given, training it if there is none.

        Args:
            client: the client; ``None`` is the pool of all clients.
            data: the client data.
            options: ``flags`` of the inner Trainer, ``reporter``, ``log`` (called with metrics and epoch).

        Raises:
            RunError: a given checkpoint is missing, damaged or of another architecture.
        """
        name = client or POOLED
        self._reader.begin(keeps=bool(options.get("federated")))
        if name in self.checkpoints:
            self._check_brought(name)
            self.files[name] = self.checkpoints[name]
            return self.files[name]
        flags = options.get("flags", {})
        epochs = self._length(flags)
        key, description, folder = self._place(client, data, flags)
        path = folder / "teacher.safetensors"
        reporter = options.get("reporter") or Reporter(enabled=False)
        found = as_first_rank_says(is_whole(path, key))
        if not found:
            waits = f"teacher of {name}: waiting for the one that"
            with self._queued(folder / "lock", lambda holder: reporter.line(f"{waits} {holder} trains in {folder}")):
                found = as_first_rank_says(is_whole(path, key))  # another process may have trained it meanwhile
                if not found:
                    around = {**options, "flags": flags, "reporter": reporter}
                    self._train(client, data, folder, key, description, around)
        if found:
            reporter.line(f"teacher of {name}: found in {folder}")
            reporter.skip(epochs)
        self.files[name] = path
        return path

    def is_busy(self, client: str | None, data: Any, **options: Any) -> bool:
        """Return whether another run trains this client's teacher just now."""
        if (client or POOLED) in self.checkpoints:
            return False
        folder = self._place(client, data, options.get("flags", {}))[2]
        return as_first_rank_says(is_queued(folder / "lock"))

    def _place(self, client: str | None, data: ClientData, flags: Mapping[str, Any]) -> tuple[str, Any, Path]:
        """Return the key of a client's teacher, what it stands for, and the folder."""
        key, description = teacher_key(self.module, self._length(flags), client, data, flags)
        return key, description, self.store / f"{client or POOLED}-{key[:16]}"

    def check_names(self, clients: list[str]) -> None:
        """Refuse checkpoints for clients that do not exist, and files that hold no teacher.

        Raises:
            ConfigError: names the unknown client and the nearest known ones.
            RunError: a given checkpoint is missing, damaged or of another architecture.
        """
        for name in self.checkpoints:
            if clients and name not in [*clients, POOLED]:
                close = difflib.get_close_matches(name, clients, cutoff=0.4) or clients
                raise ConfigError(
                    f"The teacher's checkpoints name client {name!r}, which does not exist; "
                    f"known are {', '.join(close)}."
                )
        for name in self.checkpoints:
            self._check_brought(name)

    def _check_brought(self, name: str) -> None:
        """Read a given checkpoint, once however often it is asked: it may be large, and `load` reads it anyhow."""
        if name not in self._fitting:
            read_teacher(self.checkpoints[name], name, self.module.network)
            self._fitting.add(name)

    def check_fits(self, image: Tensor, classes: int, alone: bool) -> None:
        """Refuse a module that cannot be trained on such images; ConfigError, see `check_fits` of a module."""
        check_fits(self.module, image, classes, alone, "model.teacher.module")

    def check_trained(self, clients: Sequence[str | None]) -> None:
        """Refuse to give untrained teachers to a student that only copies them.

        Raises:
            ConfigError: `epochs` is 0 and a client brings no checkpoint; names the client.
        """
        brought = [name for name in (client or POOLED for client in clients) if name not in self.checkpoints]
        if self.epochs == 0 and brought:
            raise ConfigError(
                f"model.teacher.epochs is 0, so the teacher of {brought[0]} would be untrained, and a frozen one stays "
                "so: give 1 or more, a checkpoint in model.teacher.checkpoints, or train teacher and student together "
                "by fkd_med.modules.MutualDistillationModule."
            )

    def load(self, client: str | None) -> nn.Module:
        """Return a client's teacher network; call `ensure` first. A federation reads a file once (`TeacherReader`)."""
        name = client or POOLED
        network = copy.deepcopy(self.module.network)
        network.load_state_dict(self._reader.read(self.files[name], name, self.module.network))
        return network

    def forget(self) -> None:
        """Keep no teachers in memory any longer."""
        self._reader.begin(keeps=False)

    def _length(self, flags: Mapping[str, Any]) -> int:
        return min(1, self.epochs) if is_trial(flags) else self.epochs

    def _queued(self, path: Path, waits: Callable[[str], None]) -> AbstractContextManager[None]:
        """Let one process at a time work on a teacher; others wait, and then find it."""
        return queued(path, f"The teacher store {self.store}", waits) if is_first_rank() else nullcontext()

    def architecture(self) -> nn.Module:
        """Return the network that teachers are made of."""
        return self.module.network

    def digest(self, client: str | None) -> str:
        """Return the hash of a client's teacher file; call `ensure` first."""
        with open(self.files[client or POOLED], "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def maps_folder(self) -> Path:
        """Return the folder of the teacher caches, beside the teachers."""
        return self.store / "maps"

    # --- training ---------------------------------------------------------------------------------------------

    def _train(
        self, client: str | None, data: ClientData, folder: Path, key: str, description: Any, options: dict[str, Any]
    ) -> None:
        name, reporter = client or POOLED, options["reporter"]
        module = copy.deepcopy(self.module)
        epochs = self._length(options["flags"])
        if epochs == 0:
            self._store(folder, "", module, name, key, description, TeacherCurve(name, 0, reporter))
            as_first_rank_says(True)  # the others wait until it is written
            return
        best = ModelCheckpoint(
            dirpath=folder / "training", filename="best", monitor="val/dice", mode="max", enable_version_counter=False
        )
        curve = TeacherCurve(name, epochs, reporter, options.get("log"))
        draws = SeedEpochs(global_seed(), "teacher", name)
        with seeded(global_seed(), "teacher", name), quiet():
            trainer = inner_trainer(
                options["flags"],
                max_epochs=epochs,
                callbacks=[
                    best,
                    LastCheckpoint(folder / "training"),
                    curve,
                    draws,
                    LossOnBar(reporter, f"teacher · {name}"),
                ],
                enable_checkpointing=True,
                plugins=[SafeCheckpointIO()],
                default_root_dir=folder,
            )
            last = folder / "training" / "last.ckpt"
            resume = str(last) if last.exists() else None
            train, val = data.client_train_dataloader(client, -1), data.client_val_dataloader(client)
            trainer.fit(module, train, val, ckpt_path=resume)
        self._store(folder, best.best_model_path, module, name, key, description, curve)
        release(trainer)
        trainer.strategy.barrier("teacher")

    def _store(
        self, folder: Path, best: str, module: SegmentationModule, name: str, key: str, description: Any,
        curve: TeacherCurve,
    ) -> None:  # fmt: skip
        """Write weights, then the note that makes them valid; then drop the training checkpoints."""
        if not is_first_rank():
            return
        state = read_teacher(Path(best), name, self.module.network) if best else module.network.state_dict()
        data = save({k: v.detach().cpu().contiguous().clone() for k, v in state.items()})
        atomic_write_bytes(folder / "teacher.safetensors", data)
        note = {
            "key": key,
            "client": name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "best_val_dice": curve.best,
            "curve": curve.rows,
            "description": description,
        }
        atomic_write_text(folder / "teacher.json", json.dumps(note, indent=1, default=str))
        if (folder / "training").exists():
            shutil.rmtree(folder / "training")
