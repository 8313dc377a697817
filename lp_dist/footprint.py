"""Entry point of `python -m lp_dist.footprint`: the memory and communication of a run, calculated."""

from lp_dist.report.memory import table

if __name__ == "__main__":
    print(table())
