"""From "attach this stored vTPM" to its first answer, beside swtpm's start on an existing state."""

import socket
import subprocess
from collections.abc import Callable
from itertools import count

from document import Section, Table, Target
from floors import two_flushes
from options import Options, progress
from subjects import READS, Client, Subject, Swtpm, running_subject, running_swtpms
from timing import MILLISECONDS, Call, Ratio, Sample, in_turns

from e2e_rig import BIN

LIMIT = 1.0
ROUNDS = 7
EACH = 12
OURS, REQUEST, PEER, FLUSHES = "attach to first answer", "of that, the attach request", "swtpm to first answer", "two"
_NAME = "stored"


class _Stages:
    """What one measured call did, taken apart afterwards."""
