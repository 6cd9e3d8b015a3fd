"""Time and memory of each way of combining updates, for the student and for a network of TransUNet's size; CPU.

``python benchmarks/aggregation.py`` combines 10, 100 and 1000 updates of the student (SlimUNet) and 10 and 100 of a
network of 105 million parameters. Updates are made when they are read, from a seed per client, one at a time, as a
server reads them from its journal. Each case is a process of its own. ``seconds`` (of the processor, one thread, so
that a busy machine shows little) leaves out making the updates; ``updates_in_memory`` is the update in hand and what
the peak of the process's memory rises above it, in updates.

``python benchmarks/aggregation.py flower`` (needs ``pip install '.[benchmark]'``) sets FedAvg beside Flower's ways to
average: `aggregate` takes lists of NumPy arrays, `aggregate_inplace` and `aggregate_arrayrecords` Flower's serialised
messages. Both combine the same updates, all in memory, in turns, of which the first warms up; ``ratio`` is the median
over the turns of our time over Flower's. One JSON object per line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
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
FLOWER = ("aggregate", "aggregate_inplace", "aggregate_arrayrecords")
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
        slots: how many updates have memory of their own; each is written where the one `slots` before it was.
    """

    def __init__(self, network: str, clients: int, sections: frozenset[str], slots: int = 1) -> None:
        with torch.device("meta"):
            self.like = NETWORKS[network]().state_dict()
        self.clients = clients
        self.sections = sections
        self.seconds = 0.0
        self.passes = 0
        numel = sum(tensor.numel() for tensor in self.like.values())
        self.size = sum(tensor.numel() * tensor.element_size() for tensor in self.like.values())
        self.pool = torch.rand(numel + OFFSETS, generator=torch.Generator().manual_seed(0))
        self.slots = [{n: torch.zeros(t.shape, dtype=t.dtype) for n, t in self.like.items()} for _ in range(slots)]
        self.start = Broadcast(1, {name: tensor.clone() for name, tensor in self.state(-1).items()})

    def state(self, client: int) -> State:
        """Write a client's state into its slot and return it."""
        at = int(torch.randint(OFFSETS, (), generator=torch.Generator().manual_seed(client + 1)))
        state = self.slots[client % len(self.slots)]
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor.copy_(self.pool[at : at + tensor.numel()].view(tensor.shape))
            else:
                tensor.fill_(client + 2)
            at += tensor.numel()
        return state

    def extras(self, state: State) -> Extras:
        """Return the sections; SCAFFOLD's are the client's own numbers once more."""
        made: Extras = {}
        if "fednova" in self.sections:
            made["fednova"] = {"a_norm": torch.tensor(10.0)}
        if "scaffold" in self.sections:
            made["scaffold"] = {name: state[name] for name in parameter_names(state)}
        return made

    def __iter__(self) -> Iterator[Update]:
        self.passes += 1
        for client in range(self.clients):
            begin = time.process_time()
            state = self.state(client)
            update = Update(f"{client:05d}", 1, 0, state, 10 + client % 7, 10, {}, self.extras(state))
            self.seconds += time.process_time() - begin
            yield update


def peak() -> float:
    """Return the largest memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds(work: Callable[[], Any]) -> float:
    """Return the processor's time for some work."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(rule: str, network: str, clients: int) -> dict[str, Any]:
    """Return the figures of one rule, in this process."""
    updates = Generated(network, clients, RULES[rule]().required_sections)
    before = peak()
    taken = seconds(lambda: RULES[rule]().aggregate(updates.start, updates)) - updates.seconds
    return {
        "rule": rule,
        "network": network,
        "updates": clients,
        "seconds": round(taken, 3),
        "milliseconds_per_update": round(1e3 * taken / clients, 2),
        "megabytes_of_an_update": round(updates.size / 1e6, 1),
        "updates_in_memory": round(1 + (peak() - before) / updates.size, 2),
        "passes": updates.passes,
    }


def beside_flower(way: str, network: str, clients: int) -> dict[str, Any]:
    """Return the figures of FedAvg and of one of Flower's ways on the same updates, in this process."""
    generated = Generated(network, clients, frozenset(), slots=clients)
    updates = list(generated)
    del generated.pool
    flower = flower_work(way, updates)
    before = peak()
    ours, theirs, memory = [], [], []
    for _ in range(4 if network == "TransUNet" else 10):
        for times, work in ((ours, lambda: FedAvg().aggregate(generated.start, updates)), (theirs, flower)):
            times.append(seconds(work))
            memory.append((peak() - before) / generated.size)
    ratios = [one / other for one, other in zip(ours[1:], theirs[1:], strict=True)]
    return {
        "flower": way,
        "network": network,
        "updates": clients,
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(min(ratios), 2), round(max(ratios), 2)],
        "milliseconds_per_update": round(1e3 * statistics.median(ours[1:]) / clients, 2),
        "flower_milliseconds_per_update": round(1e3 * statistics.median(theirs[1:]) / clients, 2),
        "updates_above": round(memory[0], 2),
        "flower_updates_above": round(memory[1], 2),
    }


def flower_work(way: str, updates: list[Update]) -> Callable[[], Any]:
    """Return one of Flower's ways to average some updates, given them as it wants them."""
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
    from flwr.server.strategy.aggregate import aggregate, aggregate_inplace

    arrays = [[tensor.numpy() for tensor in update.state.values()] for update in updates]
    counts = [update.num_examples for update in updates]
    if way == "aggregate":
        results = list(zip(arrays, counts, strict=True))
        return lambda: aggregate(results)
    if way == "aggregate_inplace":
        fine = Status(Code.OK, "")
        answers = [FitRes(fine, ndarrays_to_parameters(a), n, {}) for a, n in zip(arrays, counts, strict=True)]
        return lambda: aggregate_inplace([(None, answer) for answer in answers])
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    records = [
        RecordDict({"arrays": ArrayRecord(u.state), "metrics": MetricRecord({"num-examples": u.num_examples})})
        for u in updates
    ]
    return lambda: aggregate_arrayrecords(records, "num-examples")


def cases(options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield rule (or Flower's way), network and number of updates of every case that was asked for."""
    for network in options.networks:
        for clients in options.clients or CLIENTS[network]:
            for what in FLOWER if options.what == "flower" else options.rules:
                held = options.what == "flower"  # Flower needs all updates at once: ten of TransUNet are 4.2 GB
                large = network == "TransUNet" and clients > 10
                if not (large and (held or what in REPEATED)):
                    yield what, network, clients


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["rules", "flower"], default="rules")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--clients", nargs="+", type=int, help="numbers of updates")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "flower" and importlib.util.find_spec("flwr") is None:
        parser.error("flwr is not installed: pip install '.[benchmark]', best in an environment of its own")
    if options.case:
        what, network, clients = options.case
        figures = beside_flower if options.what == "flower" else measure
        print(json.dumps(figures(what, network, int(clients))), flush=True)
        return
    for case in cases(options):
        subprocess.run([sys.executable, __file__, options.what, "--case", *map(str, case)], check=True)


if __name__ == "__main__":
    main()
