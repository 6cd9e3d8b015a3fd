"""The corpus of bad inputs: each is one clear error, executes nothing, loses nothing and comes before any long work.

Odd inputs that are right (16 bit, palettes, spaces, other scripts) stand beside them, and must work.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile_images import IMAGES
from hostile_place import Place, lost, picture
from hostile_runs import RUNS
from hostile_tables import TABLES
from hostile_weights import WEIGHTS
from hostile_yaml import YAML

from fkd_med.cli import main
from slowly import slow_where

CORPUS = IMAGES | TABLES | YAML | WEIGHTS | RUNS


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", slow_where(CORPUS, set(list(WEIGHTS | RUNS)[1::2]).__contains__))
def test_corpus(name: str, templates: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case, place = CORPUS[name], Place(tmp_path, templates)
    arguments = case.prepare(place)
    before, kept = picture(tmp_path), picture(templates)
    capfd.readouterr()
    code = main(arguments)
    output = capfd.readouterr()
    shown = output.err + output.out
    assert code == case.code, shown
    assert "Traceback" not in shown and "error: unexpected" not in output.err, shown
    assert output.err.count("fkd: error:") == (code != 0), shown
    assert [word for word in case.says if word not in shown] == [], shown
    assert len(output.err) < 4000, f"{len(output.err)} characters"
    assert lost(before, picture(tmp_path), case.may_change) == []
    assert lost(kept, picture(templates), ()) == []
    assert case.holds(place)
    assert not place.sentinel.exists()
    assert code == 0 or not (place.output / "run").exists()
