"""Mutation testing: small wrong changes to the package, each of which some test must notice.

    python -m tests.mutations [--only SUBSTRING] [--list] [--jobs N]

from the root of the repository. Run by hand and before a release; the last score stands in LOG.md.
"""
