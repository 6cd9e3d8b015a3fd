"""The tables a run ends with: accuracy per hospital, and what travelled beside what could have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fkd_med.evaluation.rows import ImageRow
from fkd_med.evaluation.sheet import Column, Sheet
from fkd_med.evaluation.summary import GroupSummary, Summary, summarize

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def end_table(arms: Mapping[str, Iterable[ImageRow]], title: str = "Test", unit: str = "pixels") -> Sheet:
    """Return Dice, IoU and HD95 per hospital, their mean and the worst hospital, for arms side by side.

    Args:
        arms: Heading such as ``"federated student"`` -> its rows, one round of one split (see `group_arms`). Three
            arms fit 100 columns.
        title: Line above the table.
        unit: Unit of HD95, ``"pixels"`` or ``"mm"``.

    Raises:
        RunError: If an arm has no row.
    """
    summaries = {name: summarize(rows) for name, rows in arms.items()}
    hospitals = sorted({client for s in summaries.values() for client in s.clients})
    columns = [Column("hospital", left=True), Column("images")]
    for name in summaries:
        columns += [Column(metric, group=name) for metric in ("Dice", "IoU", "HD95")]
    rows = [_row(h, [s.clients.get(h) for s in summaries.values()]) for h in hospitals]
    rows.append(_row("mean of hospitals", [s.mean for s in summaries.values()]))
    _, _, *worst = _row("worst hospital", [s.worst for s in summaries.values()])
    rows.append(["worst hospital", "", *worst])  # a different hospital, and count, in each arm
    return Sheet(title, columns, rows, _end_notes(summaries, unit), frozenset({len(hospitals) - 1}))


@dataclass(frozen=True)
class Traffic:
    """What one client exchanges in one round, on average.

    Attributes:
        name: What travels, such as ``"student"`` or ``"TransUNet"``.
        parameters: Its number of parameters.
        up: Bytes from a client to the server.
        down: Bytes from the server to a client.
        seconds: What both take, one after the other, on the slowest client's link.
    """

    name: str
    parameters: int
    up: float
    down: float
    seconds: float


def traffic_table(
    sent: Traffic,
    instead: Sequence[Traffic],
    clients: int,
    rounds: int,
    total: float,
    link: str,
    teachers: tuple[float, float] = (0, 0),
) -> Sheet:
    """Return what travelled beside what federating larger networks would have sent.

    Args:
        sent: What was sent, measured by the ledger.
        instead: What the same rounds with other networks would have sent.
        clients: Clients per round, for the title.
        rounds: Rounds of the run, for the title.
        total: All bytes of the rounds, as the ledger counted them.
        link: The speed of the clients' links, in words.
        teachers: All bytes up and down of teachers that partners shared, beside `total`.
    """
    names = ("federated", "parameters", "up", "down", "seconds", "x parameters", "x bytes")
    columns = [Column(n, left=i == 0) for i, n in enumerate(names)]
    rows = [
        [
            traffic.name,
            f"{traffic.parameters:,}",
            human_bytes(traffic.up),
            human_bytes(traffic.down),
            f"{traffic.seconds:.2f}" if traffic.seconds < 9.995 else f"{traffic.seconds:,.0f}",
            _ratio(traffic.parameters, sent.parameters),
            _ratio(traffic.up + traffic.down, sent.up + sent.down),
        ]
        for traffic in (sent, *instead)
    ]
    notes = [
        f"{sent.name}: measured, {human_bytes(total)} in all over {rounds} {'round' if rounds == 1 else 'rounds'}. "
        "Other lines: what the same rounds would have sent.",
        f"seconds: down and up on a link of {link} (federation.uplink_mbps), as stated, not measured.",
    ]
    if any(teachers):
        up, down = map(human_bytes, teachers)
        notes.append(f"Teachers, shared once before the first round: {up} up and {down} down in all; not in the table.")
    title = f"Bytes per client and round ({clients} {'client' if clients == 1 else 'clients'})"
    return Sheet(title, columns, rows, notes, frozenset({0}))


def human_bytes(count: float) -> str:
    """Return bytes in decimal units with three digits, such as ``1.21 MB``."""
    power = 0
    # 999.5 would round to four digits.
    while count >= 999.5 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    if power == 0:
        return f"{count:.0f} B"
    digits = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:.{digits}f} {_UNITS[power]}"


def number(value: float, digits: int) -> str:
    """Return a number with a fixed count of decimals, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _row(name: str, groups: Sequence[GroupSummary | None]) -> list[str]:
    counts = sorted({g.n for g in groups if g})
    images = str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    cells = [name, images]
    for g in groups:
        cells += [number(g.dice, 3), number(g.iou, 3), number(g.hd95, 1)] if g else ["–"] * 3
    return cells


def _end_notes(summaries: Mapping[str, Summary], unit: str) -> list[str]:
    worst = "; ".join(f"{name}: {s.worst.name}" for name, s in summaries.items())
    notes = [f"Worst hospital, by Dice: {worst}.", f"HD95 in {unit}; lower is better."]
    if any(s.n_empty for s in summaries.values()):
        empty = "; ".join(f"{name}: {s.n_empty} of {s.n}" for name, s in summaries.items())
        notes.append(f"HD95 is the image diagonal where one mask lacks what the other shows: {empty} images.")
    return notes


def _ratio(value: float, base: float) -> str:
    return f"{value / base:,.0f}" if base and value / base >= 10 else f"{value / base:.1f}" if base else "–"
