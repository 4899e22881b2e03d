"""Labels, losses, optimizer, the pure step, the loop and its checkpoints."""
