"""Fine-tuning methods. Importing a module here registers its method."""

from fastpeft.adapters import adalora, full, iw_lora, lora, rslora
from fastpeft.adapters.adapter import Adapter, Importance, method_class, to_json

__all__ = ["Adapter", "Importance", "adalora", "full", "iw_lora", "lora", "method_class", "rslora", "to_json"]
