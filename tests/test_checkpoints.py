"""Checkpoints are whole or as they were, verified when read, and never run code."""

from __future__ import annotations

import enum
import os
import pickle
import shutil
import signal
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from fkd_med.checkpoints import SafeCheckpointIO, checkpoint_digest, read_checkpoint, write_checkpoint
from fkd_med.errors import ConfigError, RunError

CONTENT = {"state_dict": OrderedDict(w=torch.arange(500.0)), "epoch": 3, "loops": {"a": [1, (2.5, None, "x")]}}


class Colour(enum.IntEnum):
    """A hyper-parameter of the kind that cannot be loaded again."""

    RED = 1


class Evil:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.ckpt"
    digest = write_checkpoint(CONTENT, path)
    back = read_checkpoint(str(path))
    assert torch.equal(back["state_dict"]["w"], CONTENT["state_dict"]["w"])
    assert back["epoch"] == 3
    assert back["loops"] == CONTENT["loops"]
    assert checkpoint_digest(path) == digest
    assert os.listdir(path.parent) == ["a.ckpt"]


def test_any_reader_of_torch_files_reads_it(tmp_path: Path) -> None:
    write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    for mmap in (False, True):
        back = torch.load(tmp_path / "a.ckpt", weights_only=True, mmap=mmap)
        assert torch.equal(back["state_dict"]["w"], CONTENT["state_dict"]["w"])
    with zipfile.ZipFile(tmp_path / "a.ckpt") as file:
        assert file.testzip() is None
        assert file.comment.decode() == "fkd-sha256:" + checkpoint_digest(tmp_path / "a.ckpt")


def test_equal_content_has_equal_digests_and_other_content_another(tmp_path: Path) -> None:
    one = write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    assert write_checkpoint(CONTENT, tmp_path / "b.ckpt") == one
    assert write_checkpoint(CONTENT | {"epoch": 4}, tmp_path / "b.ckpt") != one


def test_copies_links_and_renames_keep_their_checksum(tmp_path: Path) -> None:
    digest = write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    shutil.copy(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    (tmp_path / "c.ckpt").symlink_to("a.ckpt")
    for name in ("b.ckpt", "c.ckpt"):
        assert checkpoint_digest(tmp_path / name) == digest
        assert read_checkpoint(tmp_path / name)["epoch"] == 3


def test_a_checkpoint_of_plain_lightning_is_read(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["epoch"] == 3
    with pytest.raises(RunError, match=r"a\.ckpt carries no checksum"):
        checkpoint_digest(tmp_path / "a.ckpt")


def test_every_altered_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(CONTENT, path)
    data = path.read_bytes()
    for position in range(0, len(data) - 75, 61):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(RunError, match=r"a\.ckpt was altered or damaged.*--ckpt_path"):
            read_checkpoint(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_checkpoints_are_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(CONTENT, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(RunError, match=r"a\.ckpt .*--ckpt_path"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"version https://git-lfs", b"PK\x03\x04" + b"x" * 500, pickle.dumps({"state_dict": 1})]
)
def test_foreign_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.ckpt").write_bytes(data)
    with pytest.raises(RunError, match=r"a\.ckpt"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_missing_files_folders_dangling_links_and_bare_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no checkpoint .*a\.ckpt"):
        read_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").symlink_to("gone.ckpt")
    with pytest.raises(RunError, match="links to a file that is gone"):
        read_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(RunError, match="directory"):
        read_checkpoint(tmp_path)
    torch.save(torch.ones(3), tmp_path / "c.ckpt")
    with pytest.raises(RunError, match="holds a Tensor"):
        read_checkpoint(tmp_path / "c.ckpt")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, zipped: bool) -> None:
    trace = tmp_path / "executed"
    torch.save({"x": Evil(trace)}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    for weights_only in (None, False, True):
        with pytest.raises(RunError, match=r"a\.ckpt"):
            SafeCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    assert not trace.exists()
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert trace.exists(), "the test itself is void: its payload does nothing"


def test_the_error_names_the_forbidden_object(tmp_path: Path) -> None:
    torch.save({"x": Evil(tmp_path / "executed")}, tmp_path / "a.ckpt")
    with pytest.raises(RunError, match=r"holds Python objects \(posix\.system\)"):
        read_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("value", [Path("x"), np.float64(1.0), Colour.RED, torch.nn.Linear, Evil(Path("x"))])
def test_what_could_not_be_loaded_is_not_saved_and_the_old_file_stays(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(CONTENT, path)
    with pytest.raises(RunError, match=r"'hyper_parameters\.net\[1\]' is a "):
        write_checkpoint(CONTENT | {"hyper_parameters": {"net": [1, value]}}, path)
    assert read_checkpoint(path)["epoch"] == 3
    assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_while_saving_leaves_the_old_checkpoint_and_its_checksum(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "last.ckpt"
    digest = write_checkpoint(CONTENT, path)
    child = os.fork()
    if child == 0:
        setattr(os, moment, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
        try:
            write_checkpoint(CONTENT | {"epoch": 4}, path)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert checkpoint_digest(path) == digest
    assert read_checkpoint(path)["epoch"] == 3
    write_checkpoint(CONTENT | {"epoch": 4}, path)
    assert read_checkpoint(path)["epoch"] == 4


def test_removing_a_link_leaves_its_target(tmp_path: Path) -> None:
    write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    (tmp_path / "last.ckpt").symlink_to("a.ckpt")
    plugin = SafeCheckpointIO()
    plugin.remove_checkpoint(tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["a.ckpt"]
    plugin.remove_checkpoint(str(tmp_path / "a.ckpt"))
    plugin.remove_checkpoint(tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) == []


def test_only_local_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="local disk"):
        SafeCheckpointIO().save_checkpoint(CONTENT, "s3://bucket/a.ckpt")
    with pytest.raises(ConfigError, match="storage_options"):
        SafeCheckpointIO().save_checkpoint(CONTENT, tmp_path / "a.ckpt", storage_options={})


class Tiny(L.LightningModule):
    """One weight, one optimizer."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(size, 1)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = self.net(batch[0]).square().mean()
        self.log("newest", float(self.global_step))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.1)


def a_trainer(folder: Path, epochs: int, save_last: Any) -> L.Trainer:
    saver = ModelCheckpoint(folder, "{epoch}", monitor="newest", mode="max", save_top_k=2, save_last=save_last)
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[saver], plugins=[SafeCheckpointIO()],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)


@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_lightning_saves_prunes_and_resumes_with_it(tmp_path: Path, save_last: Any) -> None:
    torch.manual_seed(0)
    a_trainer(tmp_path, 3, save_last).fit(Tiny(), data())
    assert sorted(os.listdir(tmp_path)) == ["epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]
    assert (tmp_path / "last.ckpt").is_symlink() == (save_last == "link")
    for name in os.listdir(tmp_path):
        assert checkpoint_digest(tmp_path / name)
    assert read_checkpoint(tmp_path / "last.ckpt")["epoch"] == 2

    resumed = a_trainer(tmp_path, 4, save_last)
    module = Tiny()
    resumed.fit(module, data(), ckpt_path="last")
    assert resumed.global_step == 8
    assert read_checkpoint(tmp_path / "last.ckpt")["epoch"] == 3

    torch.manual_seed(0)
    whole = Tiny()
    a_trainer(tmp_path / "whole", 4, save_last).fit(whole, data())
    assert torch.equal(whole.net.weight, module.net.weight)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_lightning_refuses_a_damaged_checkpoint(tmp_path: Path) -> None:
    a_trainer(tmp_path, 1, True).fit(Tiny(), data())
    path = tmp_path / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RunError, match=r"last\.ckpt is truncated or damaged"):
        a_trainer(tmp_path, 2, True).fit(Tiny(), data(), ckpt_path="last")
