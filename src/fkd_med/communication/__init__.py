"""What travels between server and clients: messages, their bytes, what may be in them, what they cost."""

from fkd_med.communication.allowlist import PUBLIC_LOGITS, AllowList, PublicLogits
from fkd_med.communication.codecs import (
    BFloat16,
    Codec,
    Float16,
    Float32,
    Int4,
    Int8,
    LowRank,
    Mixed,
    Spec,
    TopK,
    specs,
)
from fkd_med.communication.ledger import TEACHER, Ledger, LedgerRow, counterfactual_bytes
from fkd_med.communication.link import Link, Rates
from fkd_med.communication.messages import Broadcast, Extras, State, Update, check_client_name
from fkd_med.communication.packing import Packed, Packing
from fkd_med.communication.wire import decode, encode, section_bytes

__all__ = [
    "PUBLIC_LOGITS",
    "TEACHER",
    "AllowList",
    "BFloat16",
    "Broadcast",
    "Codec",
    "Extras",
    "Float16",
    "Float32",
    "Int4",
    "Int8",
    "Ledger",
    "LedgerRow",
    "Link",
    "LowRank",
    "Mixed",
    "Packed",
    "Packing",
    "PublicLogits",
    "Rates",
    "Spec",
    "State",
    "TopK",
    "Update",
    "check_client_name",
    "counterfactual_bytes",
    "decode",
    "encode",
    "section_bytes",
    "specs",
]
