"""UniHyperLoRA: one dictionary of rank-one atoms that adapts models of any width and depth."""
