"""The demo: poisoned handwritten digits from training to report.

`digits.py` is the project file that it writes; it is imported here only by the modules that run.
"""

from gradstore.demo.demo_result import DemoResult
from gradstore.demo.demo_run import run

__all__ = ["DemoResult", "run"]
