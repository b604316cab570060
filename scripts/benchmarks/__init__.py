"""The arms of `scripts/benchmark.py`: each module is one program, run in a process of its own."""
