"""Fine-tuning methods; config/methods.py lists them."""

from fastpeft.adapters.adapter import Adapter, Importance, method_class, to_json

__all__ = ["Adapter", "Importance", "method_class", "to_json"]
