"""The same seed gives the same bits, whatever the order of clients or the number of data workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from fkd_med.federated import Federation


class Images(L.Callback):
    """Notes the training images of every client fit; shared by all copies."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, str], torch.Tensor] = {}

    def __deepcopy__(self, memo: Any) -> Images:
        return self

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for image, name in zip(batch["image"], batch["id"], strict=True):
            self.seen[pl_module.clock.round, name] = image.clone()


def final(fed: Any, folder: Path, data: Any, seed: str = "7", monkeypatch: Any = None, **recipe: Any) -> Any:
    if monkeypatch is not None:
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
    module = fed.student()
    fed.trainer(folder, Federation(**{"rounds": 2, **recipe})).fit(module, datamodule=data)
    return fed.weights(module)


def test_order_of_clients_and_callers_draws_do_not_matter(fed, tmp_path) -> None:
    reference = final(fed, tmp_path / "1", fed.Hospitals())
    torch.manual_seed(99)
    torch.rand(17)

    class Backwards(fed.Hospitals):
        def client_names(self) -> list[str]:
            return super().client_names()[::-1]

    assert fed.same(final(fed, tmp_path / "2", Backwards()), reference)


def test_data_workers_do_not_matter(fed, tmp_path) -> None:
    reference = final(fed, tmp_path / "1", fed.Hospitals(), rounds=1)
    assert fed.same(final(fed, tmp_path / "2", fed.Hospitals(num_workers=2), rounds=1), reference)


def test_another_seed_gives_other_weights(fed, tmp_path, monkeypatch) -> None:
    """Dropout is what the run's seed reaches in this module: the data's own seed stays."""

    def dropping() -> Any:
        module = fed.student()
        module.network.insert(3, torch.nn.Dropout(0.5))
        return module

    results = []
    for seed in ("7", "7", "8"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        module = dropping()
        fed.trainer(tmp_path / str(len(results)), Federation(rounds=1)).fit(module, datamodule=fed.Hospitals())
        results.append(fed.weights(module))
    assert fed.same(results[0], results[1])
    assert not fed.same(results[0], results[2])


def test_a_clients_draws_do_not_depend_on_the_others(fed, tmp_path, captured) -> None:
    """Alone or among others, a client does the same with the same broadcast."""

    def dropping() -> Any:
        module = fed.student()
        module.network.insert(3, torch.nn.Dropout(0.5))
        return module

    for index, clients in enumerate(("ab", "b")):
        data = fed.Hospitals({name: 8 for name in clients})
        fed.trainer(tmp_path / str(index), Federation(rounds=1)).fit(dropping(), datamodule=data)
    one, other = (m.state for m in captured if getattr(m, "client", "") == "b")
    assert fed.same(one, other)


def test_rounds_draw_different_augmentations(fed, tmp_path) -> None:
    images = Images()
    final(fed, tmp_path, fed.Hospitals(), client_callbacks=[images])
    names = {name for _, name in images.seen}
    assert len(names) == sum(fed.SIZES.values())
    assert not any(torch.equal(images.seen[1, name], images.seen[2, name]) for name in names)
