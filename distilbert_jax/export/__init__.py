"""Parameters → files that others open, and answers from a trained model."""
