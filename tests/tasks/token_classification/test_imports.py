"""What token classification does not load before it is used."""

import subprocess
import sys

MODULES = ("conll", "encode", "schemes", "score", "sentences")


def test_reading_and_encoding_load_no_package_that_only_scoring_or_the_hub_needs():
    names = ", ".join(f"fastpeft.tasks.token_classification.{name}" for name in MODULES)
    code = f"import sys, {names}\nprint([n for n in ('seqeval', 'sklearn', 'datasets', 'pandas') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
