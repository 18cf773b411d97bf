"""Find a learning rate: python src/find_lr.py [CONFIG] [--set KEY=VALUE …]"""

from bandsplit.cli import entry, find_lr

if __name__ == "__main__":
    entry.run(find_lr.main)
