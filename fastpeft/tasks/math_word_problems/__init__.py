"""Word problems with a number as their answer: GSM8K and its kind."""
