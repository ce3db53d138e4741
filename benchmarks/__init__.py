"""How fast ranks are found, beside what one would use otherwise: ``make bench``, or ``python -m benchmarks --help``."""
