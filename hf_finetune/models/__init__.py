"""Backbones: loading and saving them (`load`), and their layer groups (`anatomy`, `anatomies`)."""
