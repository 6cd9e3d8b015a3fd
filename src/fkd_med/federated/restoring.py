"""What a closed round leaves in a checkpoint besides the student, and how a resumed run takes it up."""

from __future__ import annotations

import copy
from typing import Any

import torch

from fkd_med.errors import ConfigError, RunError
from fkd_med.federated.client_state import ClientStates
from fkd_med.federated.federation import Federation, aggregator_name
from fkd_med.seeding import global_seed


def federation_state(federation: Federation, states: ClientStates, round: int, threads: int) -> dict[str, Any]:
    """Return what a closed round needs besides the student: aggregator, versions of client states, seed, threads."""
    aggregator = federation.aggregator
    return {
        "round": round,
        "aggregator_name": aggregator_name(aggregator),
        "public": federation.public,
        "aggregator": copy.deepcopy(aggregator.state_dict()) if aggregator else {},
        "client_states": dict(states.versions),
        "seed": global_seed(),
        "threads": threads,
    }


def restore(stored: dict[str, Any], federation: Federation, states: ClientStates) -> None:
    """Take up what `federation_state` returned.

    Raises:
        ConfigError: other threads or another seed, which would change the bits of the rounds to come.
        RunError: another aggregator, even one that remembers nothing; other public images.
    """
    threads = torch.get_num_threads()
    if federation.threads is None and stored["threads"] != threads:
        raise ConfigError(
            f"This run used {stored['threads']} CPU threads and would now use {threads}, which changes bits: "
            f"set federation.threads to {stored['threads']}."
        )
    if stored["seed"] != global_seed():
        raise ConfigError(
            f"This run was started with seed {stored['seed']} and would go on with {global_seed()}: "
            f"give --seed_everything {stored['seed']}."
        )
    theirs, ours = stored["aggregator_name"], aggregator_name(federation.aggregator)
    if theirs != ours:
        raise RunError(
            f"This run was started with federation.aggregator {theirs} and would go on with {ours}: set it back to "
            f"{theirs}, or start a run of its own with --run_dir."
        )
    if stored["public"] != federation.public:
        raise RunError(
            "data.public holds other images than when this run was started: restore them, or start a run of its own "
            "with --run_dir."
        )
    if federation.aggregator is not None:
        federation.aggregator.load_state_dict(stored["aggregator"])
    states.versions = {str(client): int(round) for client, round in stored["client_states"].items()}
