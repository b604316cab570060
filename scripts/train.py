"""The launch target: `accelerate launch scripts/train.py --recipe recipes/frozen.yaml [KEY=VALUE …] [--output DIR]`."""

from hf_finetune.cli import train_script

if __name__ == "__main__":
    train_script()
