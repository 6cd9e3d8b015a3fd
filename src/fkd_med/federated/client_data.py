"""What the federated loop asks of a data module, so that a user's own works as well as ours."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader

from fkd_med.errors import ConfigError


@runtime_checkable
class ClientData(Protocol):
    """A Lightning data module that can also be asked for one client.

    Batches are dicts with ``image`` (N, C, H, W), ``mask`` (N, H, W), ``id`` and ``client`` (lists of N names);
    a validation or test batch holds images of one client only. It may say whose they are in ``patient`` (N names or
    numbers), which intervals draw as a whole; without it every image is a patient of its own.
    """

    def client_names(self) -> list[str]:
        """Return the clients' names, sorted."""
        ...

    def num_examples(self, client: str) -> int:
        """Return how many training images a client has."""
        ...

    def client_train_dataloader(self, client: str | None, round: int = 0) -> DataLoader[Any]:
        """Return the training batches of a client in a round (-1 for its teacher); None pools all clients."""
        ...

    def client_val_dataloader(self, client: str | None) -> DataLoader[Any]:
        """Return the validation batches of a client."""
        ...

    def client_test_dataloader(self, client: str | None) -> DataLoader[Any]:
        """Return the test batches of a client."""
        ...

    def fingerprint(self, client: str | None) -> str:
        """Return a hash of what a client trains and validates on, preprocessing included."""
        ...


def client_data(datamodule: Any) -> ClientData:
    """Return the data module as client data.

    Raises:
        ConfigError: it lacks methods the federated loop needs; they are named.
    """
    wanted = [name for name in vars(ClientData) if not name.startswith("_") and callable(getattr(ClientData, name))]
    missing = [name for name in wanted if not callable(getattr(datamodule, name, None))]
    if missing:
        raise ConfigError(
            f"A federation needs a data module with clients; {type(datamodule).__name__} lacks {', '.join(missing)}. "
            "Use fkd_med.data.FederatedDataModule, or add these methods (see fkd_med.federated.ClientData)."
        )
    data: ClientData = datamodule
    return data


def public_images(datamodule: Any, who: str) -> Any:
    """Return the public images of a data module: items with ``image`` (C, H, W), with a length, in a fixed order.

    Args:
        datamodule: the data module, after ``setup``; only algorithms that need such images ask for them.
        who: the algorithm, for the message.

    Raises:
        ConfigError: it has none.
    """
    give = getattr(datamodule, "public_images", None)
    if give is None:
        raise ConfigError(
            f"{who} needs public images, and {type(datamodule).__name__} has no method public_images: use "
            "fkd_med.data.FederatedDataModule with data.public, or add one that returns items with `image`."
        )
    images = give()
    if images is None or len(images) == 0:
        raise ConfigError(f"{who} needs public images: give data.public, a folder of images that belong to no client.")
    return images
