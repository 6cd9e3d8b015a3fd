"""Time and memory of each way of combining updates, for the student and for a network of TransUNet's size; CPU.

``python benchmarks/aggregation.py`` combines 10, 100 and 1000 updates of the student (SlimUNet) and 10 and 100 of a
network of 105 million parameters. Updates are made when they are read, from a seed per client, one at a time, as a
server reads them from its journal. Each case is a process of its own; a first pass that only makes the updates is its
base line: ``seconds`` (of the processor, one thread, so that a busy machine hardly shows) leaves out making them, and
``megabytes`` is how far the peak of the process's memory rises above that pass. ``flower`` is the aggregation of
Flower's FedAvg on the same numbers, which takes all updates at once: what it holds is counted. One JSON object per
line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fkd_med.aggregation import (
    Aggregator,
    CoordinateMedian,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedNova,
    Krum,
    MultiKrum,
    NormClippedMean,
    Scaffold,
    TrimmedMean,
    parameter_names,
)
from fkd_med.communication import Broadcast, Extras, State, Update
from fkd_med.networks import SlimUNet, TransUNet

RULES: dict[str, Callable[[], Aggregator]] = {
    "FedAvg": FedAvg,
    "FedAvgM": FedAvgM,
    "FedAdam": FedAdam,
    "FedNova": FedNova,
    "Scaffold": lambda: Scaffold(clients=10_000),
    "NormClippedMean": NormClippedMean,
    "CoordinateMedian": CoordinateMedian,
    "TrimmedMean": TrimmedMean,
    "Krum": Krum,
    "MultiKrum": MultiKrum,
}
NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {"SlimUNet": SlimUNet, "TransUNet": TransUNet}
CLIENTS = {"SlimUNet": [10, 100, 1000], "TransUNet": [10, 100]}
REPEATED = {"CoordinateMedian", "TrimmedMean", "Krum", "MultiKrum"}  # read a large network many times over
OFFSETS = 4096


class Generated:
    """Updates of as many clients as wanted, re-iterable; the numbers of one are a window of a pool, at its own place.

    Args:
        network: name of the network.
        clients: how many.
        sections: extras that each update carries.
    """

    def __init__(self, network: str, clients: int, sections: frozenset[str]) -> None:
        with torch.device("meta"):
            self.like = NETWORKS[network]().state_dict()
        self.clients = clients
        self.sections = sections
        self.passes = 0
        size = sum(tensor.numel() for tensor in self.like.values())
        self.pool = torch.rand(size + OFFSETS, generator=torch.Generator().manual_seed(0))
        self.start = Broadcast(1, self.state(-1))

    def state(self, client: int) -> State:
        """Return a client's state, in memory of its own."""
        at = int(torch.randint(OFFSETS, (), generator=torch.Generator().manual_seed(client + 1)))
        state: State = {}
        for name, tensor in self.like.items():
            values = self.pool[at : at + tensor.numel()].view(tensor.shape)
            state[name] = values.clone() if tensor.is_floating_point() else torch.tensor(client + 2)
            at += tensor.numel()
        return state

    def extras(self, state: State) -> Extras:
        """Return the sections; SCAFFOLD's are the client's own numbers once more."""
        made: Extras = {}
        if "fednova" in self.sections:
            made["fednova"] = {"a_norm": torch.tensor(10.0)}
        if "scaffold" in self.sections:
            made["scaffold"] = {name: state[name].clone() for name in parameter_names(state)}
        return made

    def __iter__(self) -> Iterator[Update]:
        self.passes += 1
        for client in range(self.clients):
            state = self.state(client)
            yield Update(f"{client:05d}", 1, 0, state, 10 + client % 7, 10, {}, self.extras(state))


def peak() -> float:
    """Return the largest memory this process has had, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(rule: str, network: str, clients: int) -> dict[str, Any]:
    """Return the figures of one case, in this process."""
    make = RULES.get(rule, FedAvg)
    updates = Generated(network, clients, make().required_sections)
    begin = time.process_time()
    for _ in updates:
        pass
    making, before = time.process_time() - begin, peak()
    updates.passes = 0
    begin = time.process_time()
    if rule == "flower":
        making += flower(updates)
    else:
        make().aggregate(updates.start, updates)
    taken = time.process_time() - begin - updates.passes * making
    return {
        "rule": rule,
        "network": network,
        "updates": clients,
        "seconds": round(max(0.0, taken), 3),
        "milliseconds_per_update": round(1e3 * max(0.0, taken) / clients, 2),
        "megabytes": round(peak() - before, 1),
        "megabytes_of_an_update": round(sum(t.numel() * t.element_size() for t in updates.like.values()) / 1e6, 1),
        "passes": updates.passes,
    }


def flower(updates: Generated) -> float:
    """Combine the updates as Flower's FedAvg does; return the seconds it took to put them into its records."""
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    seconds, records = 0.0, []
    for update in updates:
        begin = time.process_time()
        metrics = MetricRecord({"num-examples": update.num_examples})
        records.append(RecordDict({"arrays": ArrayRecord(update.state), "metrics": metrics}))
        seconds += time.process_time() - begin
    aggregate_arrayrecords(records, "num-examples")
    return seconds


def cases(options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield rule, network and number of updates of every case that was asked for."""
    for network in options.networks:
        for clients in options.clients or CLIENTS[network]:
            for rule in options.rules:
                if network == "SlimUNet" or clients <= 10 or rule not in {*REPEATED, "flower"}:
                    yield rule, network, clients


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--clients", nargs="+", type=int, help="numbers of updates")
    parser.add_argument("--rules", nargs="+", choices=[*RULES, "flower"], default=[*RULES, "flower"])
    parser.add_argument("--quick", action="store_true", help="10 updates of the student, all in this process")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case:
        print(json.dumps(measure(options.case[0], options.case[1], int(options.case[2]))), flush=True)
        return
    if options.quick:
        options.networks, options.clients = ["SlimUNet"], [10]
    if "flower" in options.rules and importlib.util.find_spec("flwr") is None:
        options.rules.remove("flower")
        print(json.dumps({"rule": "flower", "skipped": "flwr is not installed"}), flush=True)
    for case in cases(options):
        if options.quick:
            print(json.dumps(measure(*case)), flush=True)
        else:
            subprocess.run([sys.executable, __file__, "--case", *map(str, case)], check=True)


if __name__ == "__main__":
    main()
