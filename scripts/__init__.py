"""The verbs of the pipeline: every stage runs as `python -m scripts.NAME --help`."""

import signal
import sys

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Only imports come now: until `cli.run` listens, Ctrl-C ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
