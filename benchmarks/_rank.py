"""The second process of a run under `chaos.py --ddp`: Lightning starts it, as it would start ``fkd`` anew."""

import importlib
import os
import sys
from pathlib import Path

from _kills import PICTURES, POINT, RANK_POINTS
from fkd_med.cli import main

if __name__ == "__main__":
    Path("rank-1.pid").write_text(str(os.getpid()))
    if PICTURES not in os.environ:
        importlib.import_module("fkd_med.cli.report").write_pictures = lambda *_: []
    for point in RANK_POINTS:
        if point.name == os.environ.get(POINT):
            point.replace()
    sys.exit(main(sys.argv[1:]))
