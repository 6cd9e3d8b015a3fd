"""Files on disk to batches per hospital: layouts, partitioners, the manifest, the datamodule, phantoms."""

from fkd_med.data.augmentation import Augmentation
from fkd_med.data.datamodule import FederatedDataModule
from fkd_med.data.layouts import ChestXrayMasks, CVCClinicDB, FolderPair, Layout
from fkd_med.data.manifest import Manifest
from fkd_med.data.partition import IID, BySite, Dirichlet, Partitioner, QuantitySkew
from fkd_med.data.phantoms import Phantoms
from fkd_med.data.records import Record

__all__ = [
    "IID",
    "Augmentation",
    "BySite",
    "CVCClinicDB",
    "ChestXrayMasks",
    "Dirichlet",
    "FederatedDataModule",
    "FolderPair",
    "Layout",
    "Manifest",
    "Partitioner",
    "Phantoms",
    "QuantitySkew",
    "Record",
]
