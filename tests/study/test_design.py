"""What is wrong with a study is said before anything runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fkd_med.errors import ConfigError
from fkd_med.study import Arm, Difference, Preset, Study


def test_a_right_one_passes(study: Study) -> None:
    study.check()
    assert study.cells == ["x/small", "x/large", "y/small", "y/large"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"differences": [Difference("gain", of="tought", over="plain")]}, "'gain'.*'tought'.*mean taught"),
        ({"presets": {"few": Preset([1, 2, 1])}}, r"presets.few.seeds has \[1\] more than once"),
        ({"presets": {"few": Preset([])}}, "presets.few.seeds is .* one seed or more"),
        ({"presets": {"few": Preset([0], cells=["x/huge"])}}, "presets.few.cells.*x/huge"),
        ({"presets": {"few": Preset([0], arms=["plane"])}}, "presets.few.arms.*Did you mean plain"),
        ({"presets": {"few": Preset([0], {"federatet": {}})}}, "presets.few.settings.*Did you mean federated"),
        (
            {
                "arms": {
                    "plain": Arm("p", ["a"], ["federatd"]),
                    "taught": Arm("t", ["a"], ["federated", "{teacher}_taught"]),
                }
            },
            "arms.plain.settings.*'federatd'.*Did you mean federated",
        ),
        ({"arms": {"plain": Arm("p", []), "taught": Arm("t", ["a"])}}, "arms.plain.configs is empty"),
        ({"arms": {"plain": Arm("p", ["a"], cells=["x"]), "taught": Arm("t", ["a"])}}, "arms.plain.cells.*'x'"),
    ],
)
def test_a_wrong_one_names_the_key(study: Study, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(study, **change).check()  # type: ignore[arg-type]


def test_an_unknown_preset_names_those_there_are(study: Study) -> None:
    with pytest.raises(ConfigError, match=r"'paper'.*There are few"):
        study.preset("paper")
