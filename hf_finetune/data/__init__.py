"""Data: from a path to labelled splits, and from splits to batches."""
