"""Fine-tuning methods. Importing a module here registers its method."""

from fastpeft.adapters import iw_lora, lora
from fastpeft.adapters.base import Adapter, Importance, make_adapter, to_json

__all__ = ["Adapter", "Importance", "iw_lora", "lora", "make_adapter", "to_json"]
