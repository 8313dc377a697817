"""`python -m lp_dist.footprint`: memory and communication of a run on paper (`lp_dist.report.memory`)."""

from lp_dist.report.memory import table

if __name__ == "__main__":
    print(table())
