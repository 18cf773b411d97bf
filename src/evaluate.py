"""Validate a checkpoint, or the ensemble of several runs' branches: torchrun src/evaluate.py RUN [RUN …]"""

from bandsplit.cli import entry, evaluate

if __name__ == "__main__":
    entry.run(evaluate.main)
