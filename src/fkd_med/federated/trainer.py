"""The server's Trainer: Lightning's, whose epochs are communication rounds when a federation is given."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from torch import Tensor

from fkd_med.allocator import keep_memory
from fkd_med.checkpoints import LastCheckpoint, SafeCheckpointIO, checkpoint_digest, read_checkpoint
from fkd_med.communication import Ledger
from fkd_med.distillation import TeacherMaps, sample_image
from fkd_med.errors import ConfigError
from fkd_med.federated.client import give_teacher
from fkd_med.federated.federation import Federation
from fkd_med.federated.inner import as_list, inner_flags, leave_sigterm, serving
from fkd_med.federated.loop import FederatedLoop
from fkd_med.federated.progress import EpochProgress, Reporter
from fkd_med.federated.quiet import quiet
from fkd_med.federated.sharing import TeacherExchange, check_consent
from fkd_med.federated.strategies import check_batch_norm, check_parallel, check_strategy
from fkd_med.modules import DistillationModule, SegmentationModule, TeacherSource, check_fits
from fkd_med.modules.teacher_cache import Surroundings, ensure_maps, image_count
from fkd_med.rundir import RunDir

# Callbacks that act on an optimizer, which the server does not have.
_CLIENT_ONLY = (
    LearningRateMonitor,
    L.pytorch.callbacks.StochasticWeightAveraging,
    L.pytorch.callbacks.WeightAveraging,
    L.pytorch.callbacks.GradientAccumulationScheduler,
    L.pytorch.callbacks.LearningRateFinder,
    L.pytorch.callbacks.BatchSizeFinder,
    L.pytorch.callbacks.BackboneFinetuning,
)


class FederatedTrainer(L.Trainer):
    """A Lightning Trainer whose epochs are federated rounds when a federation is given.

    Checkpoints, early stopping, loggers, ``max_time`` and callbacks on epochs and validation work on the server;
    callbacks on batches, gradients or optimizers belong to ``federation.client_callbacks``.

    Args:
        federation: the round recipe; null trains centrally, as Lightning does.
        kwargs: those of `lightning.Trainer`.
    """

    fast_dev_run: int | bool
    datamodule: Any
    callbacks: list[L.Callback]

    def __init__(self, *args: Any, federation: Federation | None = None, **kwargs: Any) -> None:
        keep_memory()
        self.federation = federation
        self.flags = dict(kwargs)
        self.inner_flags = inner_flags(kwargs)  # before super().__init__: used Strategy objects are refused later
        check_strategy(kwargs.get("strategy"), federation is not None)
        self.reporter = Reporter()
        kwargs = self._server_flags(federation, kwargs) if federation is not None else self._own_progress(kwargs)
        kwargs["plugins"] = [*as_list(kwargs.get("plugins")), SafeCheckpointIO()]
        super().__init__(*args, **kwargs)
        self.reporter.enabled = self.is_global_zero
        check_batch_norm(self, kwargs.get("sync_batchnorm"))
        check_parallel(self, 1 if federation is None else federation.parallel)
        leave_sigterm(self)
        # A trial run must not touch the run that may lie in its folder.
        self.run_dir = RunDir(f"{self.default_root_dir}.fast-dev-run" if self.fast_dev_run else self.default_root_dir)
        self.goes_on = False  # without a checkpoint, with the journal of a first round that was interrupted
        self.maps: dict[str, TeacherMaps] = {}  # of the clients' teachers
        self._named_states: dict[str, set[tuple[str, int]]] = {}  # by checkpoint
        if federation is not None:
            self.fit_loop = FederatedLoop(self, federation)

    def _own_progress(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Tell of epochs as of rounds, unless a bar of Lightning's is asked for."""
        callbacks = as_list(kwargs.get("callbacks"))
        asked = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if kwargs.get("enable_progress_bar") or (asked and kwargs.get("enable_progress_bar") is None):
            return kwargs
        defaults = {"enable_progress_bar": False, "enable_model_summary": False}
        given = {name: value for name, value in kwargs.items() if value is not None}
        return {**defaults, **given, "callbacks": [*callbacks, EpochProgress(self.reporter)]}

    @staticmethod
    def _server_flags(federation: Federation, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Refuse flags a server cannot honour; take the number of rounds and Lightning's bar from the federation."""
        for name in ("max_epochs", "max_steps", "overfit_batches", "reload_dataloaders_every_n_epochs"):
            if kwargs.get(name) not in (None, -1, 0, 0.0):
                advice = "federation.rounds is the number of rounds" if name.startswith("max") else "it has no meaning"
                raise ConfigError(f"trainer.{name} cannot be set together with a federation: {advice}. Remove it.")
        for callback in as_list(kwargs.get("callbacks")):
            if isinstance(callback, _CLIENT_ONLY):
                logged = isinstance(callback, LearningRateMonitor)
                advice = "move it from trainer.callbacks to federation.client_callbacks"
                raise ConfigError(
                    f"{type(callback).__name__} acts on an optimizer, which the server of a federation does not have: "
                    + ("remove it; each client's rate is logged as <client>/lr." if logged else f"{advice}.")
                )
        defaults = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        given = {name: value for name, value in kwargs.items() if value is not None}
        return {**defaults, **given, "max_epochs": federation.rounds}

    # --- fit --------------------------------------------------------------------------------------------------

    def fit(self, model: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Train: rounds of a federation if there is one, epochs otherwise. Arguments as Lightning's."""
        if self.federation is None:
            with quiet() if self.progress_bar_callback is None else nullcontext():
                super().fit(model, *args, **kwargs)
            return
        try:
            with serving(model), quiet():
                super().fit(model, *args, **kwargs)
        finally:
            if isinstance(self.fit_loop, FederatedLoop) and self.fit_loop.crew is not None:
                self.fit_loop.crew.stop()
            if isinstance(model, DistillationModule) and model.teacher_source is not None:
                model.teacher_source.forget()
            if hasattr(self.datamodule, "teacher_maps"):  # the next fit with these data may have other teachers
                self.datamodule.teacher_maps = None
            if self.fast_dev_run and self.is_global_zero:
                shutil.rmtree(self.run_dir.path, ignore_errors=True)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint, as Lightning does; a trial run (``fast_dev_run``) writes none, not even at its end."""
        if not self.fast_dev_run:  # Lightning's ModelCheckpoint forgets that in on_train_end
            super().save_checkpoint(*args, **kwargs)

    def check_model(self, model: L.LightningModule, datamodule: Any) -> None:
        """See, before anything is written, that networks and losses fit the data and teachers can be used.

        Raises:
            ConfigError, RunError: they do not, or cannot; names the key.
        """
        if isinstance(model, SegmentationModule):
            self._check_fits(partial(check_fits, model), datamodule)
        if isinstance(model, DistillationModule) and model.active_losses and model.teacher_source is not None:
            model.check_teachers(self._taught(datamodule))
            self._check_fits(model.teacher_source.check_fits, datamodule)

    def _check_fits(self, check: Callable[[Tensor, int, bool], None], datamodule: Any) -> None:
        """Make a dry pass on an image of data that say how many classes they have."""
        image, classes = sample_image(datamodule), getattr(datamodule, "classes", None)
        if image is None or classes is None:
            return
        more = getattr(datamodule, "num_unlabelled", lambda client: 0)(None)
        # several devices may share BatchNorm's statistics
        alone = getattr(datamodule, "batch_size", None) == 1 == self.world_size and not more
        check(image.to(self.strategy.root_device), classes, alone)

    def _taught(self, datamodule: Any) -> list[str | None]:
        """Return whose teachers a run needs; None is the pool of all clients."""
        if self.federation is not None:
            return list(datamodule.client_names())
        return [getattr(datamodule, "client", None)]

    def teachers(self, model: L.LightningModule, datamodule: Any) -> None:
        """Train the teachers of a distillation that do not exist yet, and nothing else.

        Raises:
            ConfigError: the module distils from nobody.
        """
        if not isinstance(model, DistillationModule) or model.teacher_source is None:
            raise ConfigError("This configuration has no teachers: model must be a DistillationModule with a teacher.")
        if self.federation is not None:
            check_consent(self.federation.share_teachers, self.federation.is_local, model)
        self._check_fits(model.teacher_source.check_fits, datamodule)
        self._ensure(model, datamodule, self._taught(datamodule))

    def arm(self, client: str | None = None) -> str:
        """Return how this run trains, in a word: federated, local-only, pooled, or the one client's name."""
        if self.federation is not None:
            return "local-only" if self.federation.is_local else "federated"
        return f"{client} only" if client else "pooled"

    def ensure_teachers(self, clients: list[str], ledger: Ledger) -> None:
        """Train the teachers that the module distils from and that do not exist yet; share them if it is agreed.

        Args:
            clients: all clients of the federation.
            ledger: where the bytes of shared teachers are counted.
        """
        module = self.lightning_module
        if not isinstance(module, DistillationModule) or not module.active_losses:
            return
        if module.teacher_source is None:
            raise ConfigError("Distillation needs a teacher for each client: give model.teacher.")
        self._ensure(module, self.datamodule, list(clients))
        source = module.teacher_source
        if source.shares:
            folder, barrier = self.run_dir.shared_teachers, self.strategy.barrier
            exchange = TeacherExchange(source.architecture(), folder, ledger, self.is_global_zero, barrier)
            source.share(clients, exchange)
            self.reporter.line(f"teachers of {len(clients)} clients shared with all others: {exchange.summary()}")
        if module.teacher_cache != "off":
            self._ensure_maps(module, source, clients)

    def _ensure(self, module: DistillationModule, data: Any, clients: list[str | None]) -> None:
        if self.federation is not None and self.federation.is_local:
            module.learn_alone()
        source = module.teacher_source
        assert source is not None
        module.check_teachers(clients)
        module.check_data(data, Surroundings.of(self))
        image = sample_image(data)
        if image is not None:
            module.rehearse(image)
        epochs = 1 if self.fast_dev_run else getattr(source, "epochs", 1)
        asking = clients[:1] if source.one_for_all else clients
        self.reporter.begin("teachers", len(asking) * epochs)
        left, options = list(asking), self.teacher_options()
        while left:  # runs side by side train different teachers, instead of waiting for the same one
            client = next((one for one in left if not source.is_busy(one, data, **options)), left[0])
            source.ensure(client, data, **options)
            left.remove(client)
        self.reporter.end()

    def _ensure_maps(self, module: DistillationModule, source: TeacherSource, clients: list[str]) -> None:
        """Let each client's teacher answer all its images once, unless it has."""
        data, around = self.datamodule, Surroundings.of(self)
        self.reporter.begin("teacher maps", sum(image_count(data, client) for client in clients))
        for client in clients:
            maps = ensure_maps(source, client, data, module.teacher_taps, around, module.teacher_views)
            if maps is not None:
                self.maps[client] = maps
        self.reporter.end()

    def teacher_options(self) -> dict[str, Any]:
        """Return how teachers are trained in this run: flags, progress, where their curves go, whether federated."""
        around = {"flags": self.inner_flags, "reporter": self.reporter, "log": self._log_teacher}
        return around | {"federated": self.federation is not None}

    def teachers_after(self, module: DistillationModule) -> TeacherSource | None:
        """Return the teachers of a fit that is over, as they now are."""
        loop = self.fit_loop
        if not isinstance(loop, FederatedLoop):
            return module.teachers_after(lambda client: module.companions.tensors())
        return module.teachers_after(lambda client: loop.states.load(client or "").companions)

    def attach_teacher(self, module: L.LightningModule, client: str) -> None:
        """Give a client's copy of the module that client's teacher."""
        give_teacher(module, client, self.datamodule, self.maps)

    def _log_teacher(self, metrics: dict[str, float], epoch: int) -> None:
        for logger in self.loggers:
            log = getattr(logger, "log_teacher", None)
            if log is not None:
                log(metrics, epoch)

    # --- what checkpoints need --------------------------------------------------------------------------------

    def needed_states(self) -> set[tuple[str, int]]:
        """Return the (client, round) states that checkpoints on disk would resume from."""
        needed: set[tuple[str, int]] = set()
        for callback in self.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint) or not isinstance(callback, ModelCheckpoint):
                continue  # last.ckpt, just written, names the current states
            paths = {callback.best_model_path, callback.last_model_path, *callback.best_k_models}
            for path in paths:
                if path and Path(path).exists():
                    needed |= self._states_in(path)
        return needed

    def _states_in(self, path: str) -> set[tuple[str, int]]:
        key = checkpoint_digest(path)
        if key not in self._named_states:
            loops = read_checkpoint(path, "cpu").get("loops", {})
            stored = loops.get("fit_loop", {}).get("state_dict", {}).get("federation", {})
            self._named_states[key] = set(stored.get("client_states", {}).items())
        return self._named_states[key]
