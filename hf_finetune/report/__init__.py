"""What a run looks like afterwards: curves, tables, comparisons."""
