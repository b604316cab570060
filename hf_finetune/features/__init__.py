"""What is frozen is computed once: outputs of a network's frozen prefix, kept on disk and trained on."""
