"""``hf-sp``: what a user asks before a run. Each command prints tables, or JSON with ``--json``."""
