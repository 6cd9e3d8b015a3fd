"""Which keys of a configuration a resume may change: a table, and what it does not list may not be changed.

A key decides if another value would give other weights, another choice of the best weights, or other messages. Keys
are written without ``init_args``; an entry counts for all keys below it, and the longest entry wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Verdict = Literal["decides", "harmless"]

_DECIDES = {
    "": "seed_everything data model",
    "federation": """rounds local_epochs local_steps aggregator fraction participation quorum firewall client_rules
        uplink downlink batch_norm personal frozen optimizer_state client_callbacks chaos threads server_distillation
        share_logits share_teachers""",
    "trainer": """accelerator strategy devices num_nodes precision callbacks fast_dev_run max_epochs min_epochs
        max_steps min_steps limit_train_batches limit_val_batches overfit_batches val_check_interval
        check_val_every_n_epoch accumulate_grad_batches gradient_clip_val gradient_clip_algorithm
        deterministic benchmark plugins barebones use_distributed_sampler sync_batchnorm
        reload_dataloaders_every_n_epochs enable_checkpointing""",
    # With another metric or trigger, Lightning forgets which weights were the best so far.
    "checkpoint": """dirpath monitor mode every_n_train_steps train_time_interval every_n_epochs
        save_on_train_epoch_end""",
}
_HARMLESS = {
    "": "run_dir test_after_fit",
    "data": "num_workers",
    "model.teacher": "store",  # a teacher is found again, or trained anew, by what decides it
    "federation": "uplink_mbps downlink_mbps local_baseline parallel",
    "trainer": """logger max_time limit_test_batches limit_predict_batches num_sanity_val_steps log_every_n_steps
        enable_progress_bar enable_model_summary inference_mode profiler detect_anomaly default_root_dir
        enable_autolog_hparams model_registry""",
    "checkpoint": """filename verbose save_last save_top_k save_on_exception save_weights_only auto_insert_metric_name
        enable_version_counter""",
}


def _table(sections: Mapping[str, str], verdict: Verdict) -> dict[str, Verdict]:
    return {f"{head}.{name}".lstrip("."): verdict for head, names in sections.items() for name in names.split()}


RULES = _table(_DECIDES, "decides") | _table(_HARMLESS, "harmless")

# Callbacks that only watch, by the package and the class's name.
_WATCHERS = {
    ("lightning", name)
    for name in (
        "DeviceStatsMonitor", "LearningRateMonitor", "ModelSummary", "ProgressBar", "RichModelSummary",
        "RichProgressBar", "ThroughputMonitor", "TQDMProgressBar",
    )
}  # fmt: skip


def verdict(key: str) -> Verdict | None:
    """Return what the table says of a key, by its longest entry; None of a key that nobody has thought about."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        found = RULES.get(".".join(parts[:length]))
        if found is not None:
            return found
    return None


def acting(callbacks: Any) -> list[Any]:
    """Return those of the configured callbacks that may do more than watch."""
    listed = callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]
    return [callback for callback in listed if not _only_watches(callback)]


def _only_watches(callback: Any) -> bool:
    path = callback.get("class_path", "") if isinstance(callback, dict) else ""
    return (path.partition(".")[0], path.rpartition(".")[2]) in _WATCHERS
