"""What travels between server and clients: messages, their bytes, what may be in them, what they cost."""

from fkd_med.communication.allowlist import AllowList
from fkd_med.communication.ledger import Ledger, LedgerRow, counterfactual_bytes
from fkd_med.communication.messages import Broadcast, Extras, State, Update, check_client_name
from fkd_med.communication.wire import decode, encode, section_bytes

__all__ = [
    "AllowList",
    "Broadcast",
    "Extras",
    "Ledger",
    "LedgerRow",
    "State",
    "Update",
    "check_client_name",
    "counterfactual_bytes",
    "decode",
    "encode",
    "section_bytes",
]
