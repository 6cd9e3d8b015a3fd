"""Phantoms: the same bytes each time, repaired when broken, never over somebody's files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from fkd_med.data import Phantoms
from fkd_med.data.images import read_image, read_mask
from fkd_med.errors import ConfigError, DataError


def digest(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def small(**changes: object) -> Phantoms:
    return Phantoms(**({"hospitals": 2, "images": 6, "size": 48} | changes))  # type: ignore[arg-type]


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    small().prepare(tmp_path / "one")
    small().prepare(tmp_path / "two")
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    small(seed=1).prepare(tmp_path / "three")
    changed = digest(tmp_path / "three")
    assert not set(changed.values()) - {changed["clients.csv"]} & set(digest(tmp_path / "one").values())


def test_a_hospital_does_not_depend_on_the_others(tmp_path: Path) -> None:
    small().prepare(tmp_path / "two")
    small(hospitals=3, images=[6, 6, 2]).prepare(tmp_path / "three")
    two, three = digest(tmp_path / "two"), digest(tmp_path / "three")
    assert all(three[name] == two[name] for name in two if name.endswith(".png"))


def test_preparing_again_writes_nothing(tmp_path: Path) -> None:
    small().prepare(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    small().prepare(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_broken_folder_is_repaired(tmp_path: Path) -> None:
    small().prepare(tmp_path)
    whole = digest(tmp_path)
    images = sorted((tmp_path / "images").iterdir())
    images[0].unlink()
    images[1].write_bytes(images[1].read_bytes()[:100])
    (tmp_path / "clients.csv").unlink()
    small().prepare(tmp_path)
    assert digest(tmp_path) == whole


def test_an_interrupted_folder_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fkd_med.data.phantoms as module

    small().prepare(tmp_path / "whole")
    painted = []

    def stop_at_five(*args: object) -> object:
        painted.append(args)
        if len(painted) == 5:
            raise KeyboardInterrupt
        return paint(*args)  # type: ignore[arg-type]

    paint = module.paint
    monkeypatch.setattr(module, "paint", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        small().prepare(tmp_path / "cut")
    monkeypatch.undo()
    small().prepare(tmp_path / "cut")
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_other_arguments_replace_phantoms(tmp_path: Path) -> None:
    small(images=8).prepare(tmp_path / "changed")
    small().prepare(tmp_path / "changed")
    small().prepare(tmp_path / "fresh")
    assert digest(tmp_path / "changed") == digest(tmp_path / "fresh")


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not phantoms"):
        small().prepare(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("wrong", [{"hospitals": 0}, {"images": 0}, {"images": [3]}, {"size": 8}])
def test_numbers_that_make_no_hospital_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="Phantoms"):
        small(**wrong)


def test_the_task_is_worth_learning(tmp_path: Path) -> None:
    phantoms = Phantoms(images=24, size=64)
    phantoms.prepare(tmp_path)
    records = phantoms.records(tmp_path)
    assert len(records) == 72 and {r.client for r in records} == {"hospital-a", "hospital-b", "hospital-c"}
    assert len({r.patient for r in records}) == 18
    shares, colours, contrasts = [], {}, []
    for record in records:
        assert record.mask is not None
        image, mask = read_image(record.image, 3), read_mask(record.mask)
        assert image.shape == (64, 64, 3) and set(np.unique(mask)) <= {0, 255}
        shares.append(np.mean(mask > 0))
        colours.setdefault(record.client, []).append(image.mean((0, 1)))
        if 0 < shares[-1] < 1:
            contrasts.append(image[mask > 0].mean() - image[mask == 0].mean())
    assert 0 < sum(share == 0 for share in shares) < 15  # some without lesion
    assert 0.02 < np.mean(shares) < 0.3 and max(shares) > 5 * np.quantile(shares, 0.2)  # small and large ones
    assert np.mean(np.array(contrasts) > 0) == pytest.approx(0.5, abs=0.3)  # brightness alone does not tell
    means = [np.mean(c, axis=0) for c in colours.values()]
    assert min(np.abs(a - b).max() for i, a in enumerate(means) for b in means[:i]) > 0.04  # hospitals differ
