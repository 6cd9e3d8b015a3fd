"""Tensors that stay with a client: what a client evaluates with is always merge(global, personal[client])."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

State = dict[str, Tensor]


def merge(shared: Mapping[str, Tensor], personal: Mapping[str, Tensor] | None) -> State:
    """Return the shared state with a client's own tensors in place of the shared ones."""
    return {**shared, **(personal or {})}


class PersonalTensors:
    """Holds each client's personal tensors for one module and puts them in and out of it.

    Args:
        module: the network whose ``state_dict`` names the tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        self._owner = weakref.ref(module)  # weak: else no copy of a module would be freed when its fit is over
        self._shared: State | None = None
        self._entered: tuple[str | None, bool] | None = None
        self.by_client: dict[str, State] = {}
        self.best: dict[str, State] = {}
        self.best_score: dict[str, float] = {}
        self.best_round: dict[str, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> PersonalTensors:
        """Copy for the copy of the module that is being made; the tensors, never changed in place, are shared."""
        new = PersonalTensors(memo.get(id(self._module), self._module))
        new.by_client, new.best = dict(self.by_client), dict(self.best)
        new.best_score, new.best_round = dict(self.best_score), dict(self.best_round)
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Go to another process together with the module."""
        return vars(self) | {"_owner": self._module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Belong to the module that came along."""
        vars(self).update(state | {"_owner": weakref.ref(state["_owner"])})

    @property
    def _module(self) -> nn.Module:
        module = self._owner()
        assert module is not None, "these tensors belong to a module that is gone"
        return module

    @property
    def are_students(self) -> bool:
        """Whether clients keep whole students, as they do alone, and not parts beside those of the global one."""
        names = self._module.state_dict().keys()
        return bool(self.by_client) and all(own.keys() >= names for own in self.by_client.values())

    def enter(self, client: str | None, best: bool = False) -> None:
        """Load the merged state of `client`; nothing happens while no client has personal tensors.

        Args:
            client: whose tensors to take.
            best: those of the client's best validation instead of the latest.
        """
        if not self.by_client or self._entered == (client, best):
            return
        if self._shared is None:
            self._shared = {name: tensor.detach().clone() for name, tensor in self._module.state_dict().items()}
        own = self.best if best and client in self.best else self.by_client
        self._module.load_state_dict(merge(self._shared, own.get(client or "")))
        self._entered = (client, best)

    def round_of(self, client: str, latest: int) -> int:
        """Return the round of the tensors that are entered for `client`; `latest` is that of the module."""
        return self.best_round.get(client, latest) if self._entered == (client, True) else latest

    def note(self, client: str, score: float, round: int) -> None:
        """Keep a client's student if it validates better than all before: alone, each client stops at its best.

        Parts of a student belong to the global tensors of their round, so none are kept.
        """
        if self.are_students and client in self.by_client and score > self.best_score.get(client, float("-inf")):
            self.best_score[client], self.best_round[client] = score, round
            self.best[client] = self.by_client[client]

    def leave(self) -> None:
        """Put the shared tensors back."""
        if self._shared is not None:
            self._module.load_state_dict(self._shared)
            self._shared = self._entered = None

    def of(self, client: str) -> State:
        """Return the client's own of the tensors it predicts with: of its best validation, else the latest."""
        return self.best.get(client) or self.by_client.get(client, {})

    def state_dict(self) -> dict[str, Any]:
        """Return the latest and best personal tensors by client, and the best scores and their rounds."""
        best = {"best": _on_cpu(self.best), "best_score": dict(self.best_score), "best_round": dict(self.best_round)}
        return {"latest": _on_cpu(self.by_client), **best}

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; nothing stored is no personal tensors."""
        self._shared = self._entered = None
        self.by_client = _on_cpu(stored.get("latest", {}))
        self.best = _on_cpu(stored.get("best", {}))
        self.best_score = dict(stored.get("best_score", {}))
        self.best_round = dict(stored.get("best_round", {}))


def _on_cpu(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, State]:
    return {client: {name: tensor.cpu() for name, tensor in state.items()} for client, state in states.items()}
