"""Bytes counted as they travelled, also across a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fkd_med.communication import TEACHER, Broadcast, Ledger, Link, Update, counterfactual_bytes, encode
from fkd_med.communication.wire import DTYPES
from fkd_med.errors import ConfigError, RunError


def filled(path: Path | None) -> Ledger:
    ledger = Ledger(path)
    for round in range(3):
        for client in ("a", "b, c"):
            ledger.record(round, client, "down", "state", 100)
            ledger.record(round, client, "up", "header", 7)
            ledger.record(round, client, "up", "state", 10 + round)
    return ledger


def test_totals_by_round_client_direction_and_section() -> None:
    ledger = filled(None)
    assert ledger.total() == ledger.rows[-1].cumulative == 6 * 100 + 6 * 7 + 2 * (10 + 11 + 12)
    assert ledger.total(direction="up") == 6 * 7 + 2 * 33
    assert ledger.total(round=1, client="a") == 100 + 7 + 11
    assert ledger.total(section="header") == 42
    assert ledger.per_message()[2, "b, c", "up"] == 19
    assert ledger.mean_per_message("up") == (17 + 18 + 19) / 3
    assert Ledger().mean_per_message("down") == 0


def test_shared_teachers_belong_to_no_round() -> None:
    ledger, rounds = Ledger(), filled(None)
    for way, size in (("up", 4000), ("down", 4000), ("down", 5000)):
        ledger.record(0, "a", way, TEACHER, size)  # type: ignore[arg-type]
    for row in rounds.rows:
        ledger.record(row.round, row.client, "up" if row.direction == "up" else "down", row.section, row.bytes)
    for way in ("up", "down"):
        assert ledger.mean_per_message(way) == rounds.mean_per_message(way)  # type: ignore[arg-type]
    assert ledger.total() == rounds.total() + 13_000
    assert ledger.total(section=TEACHER, direction="down") == 9000


def test_bytes_are_those_of_the_message(tmp_path: Path) -> None:
    ledger = Ledger()
    data = encode(Update("a", 0, 0, {"w": torch.ones(5)}, 1, 1, {}, {"ctl": {"w": torch.ones(5)}}))
    ledger.record_message(0, "a", "up", data)
    assert ledger.total() == len(data)
    assert ledger.total(section="state") == ledger.total(section="extras:ctl") == 20


def test_the_file_is_appended_to_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.csv"
    ledger = Ledger(path)
    assert not path.exists()
    ledger.record(0, "a", "down", "state", 5)
    ledger.flush()
    ledger.record(0, "a", "up", "state", 6)
    ledger.flush()
    ledger.flush()
    assert path.read_text() == (
        "round,client,direction,section,bytes,cumulative,seconds\n0,a,down,state,5,5,0.0\n0,a,up,state,6,11,0.0\n"
    )
    assert Ledger(path).rows == ledger.rows


def test_a_resume_drops_open_rounds_and_records_them_again(tmp_path: Path) -> None:
    path, other = tmp_path / "ledger.csv", tmp_path / "other.csv"
    filled(other).flush()
    filled(path).flush()
    with open(path, "a") as file:
        file.write("3,a,down,sta")  # killed while appending
    ledger = Ledger(path)
    ledger.drop_after(1)
    assert {row.round for row in Ledger(path).rows} == {0, 1}
    for row in filled(None).rows:
        if row.round == 2:
            ledger.record(2, row.client, "up" if row.direction == "up" else "down", row.section, row.bytes)
    ledger.flush()
    assert path.read_bytes() == other.read_bytes()


def test_dropping_everything_leaves_an_empty_ledger(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.csv")
    ledger.flush()
    ledger.drop_after(-1)
    assert Ledger(tmp_path / "ledger.csv").rows == []
    ledger.record(0, "a", "up", "state", 1)
    ledger.flush()
    assert len(Ledger(tmp_path / "ledger.csv").rows) == 1


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "round,client,direction,section,bytes,cumulative\n0,a,up,state,x,5\n", "\xff\n"]
)
def test_what_is_no_ledger_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"ledger\.csv"):
        Ledger(tmp_path / "ledger.csv")


def test_the_counterfactual_is_exact() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 120, 1)).half()
    as_fp32 = {n: t.float() if t.is_floating_point() else t for n, t in net.state_dict().items()}
    assert counterfactual_bytes(net.state_dict()) == len(encode(Broadcast(0, as_fp32)))
    with torch.device("meta"):
        twin = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 120, 1))
    assert counterfactual_bytes(twin.state_dict()) == len(encode(Broadcast(0, as_fp32)))


def test_the_counterfactual_is_exact_for_every_dtype_and_odd_names() -> None:
    state = {f'{name}.é"\\{i}': torch.zeros(i * 7, 3).to(d) for i, (name, d) in enumerate(DTYPES.items())}
    state |= {f"é{i}": torch.zeros((), dtype=d) for i, d in enumerate(reversed(DTYPES.values()))}
    as_fp32 = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    assert counterfactual_bytes(state) == len(encode(Broadcast(0, as_fp32)))


def test_the_counterfactual_of_a_hundred_million_parameters_needs_no_memory() -> None:
    state = {"w": torch.empty(105_000_000, device="meta")}
    assert 420_000_000 < counterfactual_bytes(state) < 420_000_500


def test_seconds_on_the_links_that_were_stated(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.csv", Link({"a": 8.0, "b": 0.8}, 80.0))  # Mbit/s
    for client in ("a", "b"):
        ledger.record(1, client, "down", "state", 1_000_000)
        ledger.record(1, client, "up", "header", 400_000)
        ledger.record(1, client, "up", "state", 600_000)
    assert [row.seconds for row in ledger.rows] == [0.1, 0.4, 0.6, 0.1, 4.0, 6.0]
    assert ledger.seconds(1) == pytest.approx(10.1) and ledger.seconds(2) == 0
    ledger.flush()
    assert Ledger(tmp_path / "ledger.csv").seconds(1) == pytest.approx(10.1)
    assert Link({"a": 8.0, "b": 0.8}, 80.0).slowest(["a", "b"], up=1e6, down=1e6) == pytest.approx(10.1)


def test_a_resume_with_another_link_says_its_seconds_throughout(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "ledger.csv", Link(8.0))
    first.record(1, "a", "up", "state", 1_000_000)
    first.flush()
    resumed = Ledger(tmp_path / "ledger.csv", Link(4.0))
    resumed.drop_after(1)
    assert resumed.seconds(1) == Ledger(tmp_path / "ledger.csv").seconds(1) == 2.0


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"a": 1.0}, "has no speed for client 'b'"),
        ({"a": 1.0, "b": 1.0, "bb": 1.0}, "names client 'bb'.*Did you mean 'b'"),
    ],
)
def test_a_link_for_each_client_and_for_nobody_else(rates: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=f"federation.uplink_mbps {message}"):
        Link(rates).check(["a", "b"])
    Link(rates.get("a", 1.0)).check(["a", "b"])


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_speeds_are_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="downlink_mbps of client 'a'"):
        Link(1.0, {"a": rate})
    with pytest.raises(ConfigError, match="uplink_mbps is"):
        Link(rate)
