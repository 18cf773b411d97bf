"""Train an ensemble: torchrun src/train.py [CONFIG] [--set KEY=VALUE …]"""

from bandsplit.cli import entry, train

if __name__ == "__main__":
    entry.run(train.main)
