"""Augmentation: random views of images, batches and texts, each a pure function of (seed, epoch, index)."""
