"""Validate a checkpoint, or join runs of some branches each into one ensemble: torchrun src/evaluate.py RUN [RUN …]"""

from bandsplit.cli import entry, evaluate

if __name__ == "__main__":
    entry.run(evaluate.main)
