"""`python -m hf_finetune`: the command line where its command is not on the path."""

from hf_finetune.cli import run

if __name__ == "__main__":
    run()
