"""The work of `_rounds.py` in Flower's simulation engine: a ServerApp with FedAvg, a ClientApp, one worker of ray.

The worker has one processor, so that clients train one after another, each in one thread. Everything but the engine is
that of the bare loop: hospitals and student stay in the worker between rounds, and a message carries nothing but the
student's arrays, the number of the round and the number of images.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import time
import warnings
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when flwr is imported
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch

from _rounds import Measured, Work, hospitals, now, per_round, student, train

MISSING = "Flower's simulation engine is not installed: pip install '.[benchmark]', best in an environment of its own"
ONE_AT_A_TIME = {
    "init_args": {"num_cpus": 1, "log_to_driver": False, "logging_level": logging.ERROR},
    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
}


def installed() -> bool:
    """Tell whether Flower and the engine's workers (ray) are there."""
    return all(importlib.util.find_spec(name) is not None for name in ("flwr", "ray"))


def flower(work: Work) -> tuple[Measured, dict[str, float]]:
    """Do the work in Flower; return also what its start took: until the first round begins, and that round."""
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    times: list[tuple[float, float]] = []
    students: list[Any] = []
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(
            server_app=server_app(work, times, students),
            client_app=client_app(work),
            num_supernodes=work.clients,
            backend_config=ONE_AT_A_TIME,
        )
    run = time.perf_counter() - began
    if len(times) <= work.rounds:
        raise SystemExit("Flower's server did not do all rounds; set the level of the logger 'flwr' to see why")
    start = {"start_s": times[0][0] - began, "first_round_s": times[1][0] - times[0][0]}
    return Measured(per_round(times)[0], run, students[1].to_torch_state_dict()), start


def server_app(work: Work, times: list[tuple[float, float]], students: list[Any]) -> Any:
    """Return a server that averages; it notes when each round begins, with which student, and when the last ends."""
    from flwr.app import ArrayRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg

    class Noting(FedAvg):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            """Note the beginning of a round."""
            times.append(now())
            students.append(arrays)
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            """Refuse a round in which a client failed: it would be a short one."""
            replies = list(replies)
            failed = [reply.error.reason for reply in replies if reply.has_error()]
            if failed or len(replies) < work.clients:
                raise RuntimeError(f"round {server_round}: {failed or 'a client did not answer'}")
            return super().aggregate_train(server_round, replies)

    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        everyone = {"min_train_nodes": work.clients, "min_available_nodes": work.clients}
        strategy = Noting(fraction_train=1.0, fraction_evaluate=0.0, **everyone)
        strategy.start(grid, ArrayRecord(student().state_dict()), num_rounds=work.rounds)
        times.append(now())

    return app


def client_app(work: Work) -> Any:
    """Return a client that trains the student it is sent."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def fit(message: Any, context: Any) -> Any:
        torch.set_num_threads(1)
        client = hospitals(work).client_names()[int(context.node_config["partition-id"])]
        worker = copy.deepcopy(student())
        worker.load_state_dict(message.content["arrays"].to_torch_state_dict())
        train(worker, work, client, int(message.content["config"]["server-round"]))
        metrics = MetricRecord({"num-examples": hospitals(work).num_examples(client)})
        answer = RecordDict({"arrays": ArrayRecord(worker.state_dict()), "metrics": metrics})
        return Message(content=answer, reply_to=message)

    return app
