"""From documents to batches: sources → token ids → packed rows on disk → the batch of a step."""
