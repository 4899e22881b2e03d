"""How fast a model is, measured side by side in one run."""
