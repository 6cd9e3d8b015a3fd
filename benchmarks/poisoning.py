"""What a lying hospital does to the model: one of five sends nonsense in every round, under several rules.

``python benchmarks/poisoning.py --root DIR`` deals the images to five hospitals and runs, for each rule, the clean
federation and one in which the liar's update has a NaN in it, is scaled by 100, turned in sign or random. Compared is
each rule under attack with the plain mean without one (``plain``): test Dice over all hospitals, the liar's included.

One JSON object per line.
"""

from __future__ import annotations

import json

from _paired_runs import Arm, measure, parser

RULES = {
    "mean": ["--federation.firewall", "null"],
    "firewall": ["--federation.quorum", "0.6"],
    "trimmed_mean": [
        *("--federation.quorum", "0.6", "--federation.aggregator", "TrimmedMean"),
        *("--federation.aggregator.fraction", "0.2"),
    ],
    "multi_krum": ["--federation.quorum", "0.6", "--federation.aggregator", "MultiKrum"],
}
LIES = ("nan", "scale", "flip", "random")


def attack(lie: str, liar: str) -> list[str]:
    """Return the option that makes a client lie."""
    settings = {"class_path": "fkd_med.federated.Chaos", "init_args": {"liars": {liar: lie}}}
    return ["--federation.chaos", json.dumps(settings)]


def arms(liar: str) -> list[Arm]:
    """Return all arms, the clean ones first."""
    clean = [Arm(f"{rule}_clean", tuple(RULES[rule]), reference="plain") for rule in ("trimmed_mean", "multi_krum")]
    attacked = [
        Arm(f"{rule}_{lie}", (*RULES[rule], *attack(lie, liar)), reference="plain") for lie in LIES for rule in RULES
    ]
    return [Arm("plain"), *clean, *attacked]


if __name__ == "__main__":
    given = parser(__doc__ or "", seeds=1).parse_args()
    measure(arms("hospital-b" if given.quick or given.root is None else "hospital-2"), given)
