"""Plot and tabulate one or more runs: python src/report.py RUN [RUN …]"""

from bandsplit.cli import entry, report

if __name__ == "__main__":
    entry.run(report.main)
