"""Runs the code blocks of the documentation, and compares what they print with what is shown."""

import doctest
import os

from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser

# Before torch is loaded: each process of a parallel run has its share of the cores, for threads
# that wait for one another at barriers stand still where they are more than the cores.
processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if processes > 1:
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

pages = Sybil(
    parsers=[PythonCodeBlockParser(doctest_optionflags=FLAGS), SkipParser()],
    patterns=["README.md", "docs/*.md"],
)
docstrings = Sybil(
    parsers=[DocTestParser(optionflags=FLAGS)],
    patterns=["src/**/*.py"],
    document_types={".py": PythonDocStringDocument},
)
pytest_collect_file = (pages + docstrings).pytest()
