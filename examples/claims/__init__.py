"""What the theory "information loss leads to flat basins" claims, tested one experiment at a time.

``python -m examples.claims.NAME`` runs one, ``python -m examples.claims`` all. Each prints what it measured beside what
was predicted, fails where its finding does not hold, and with ``--write`` renews its page in ``docs/claims``.
"""
