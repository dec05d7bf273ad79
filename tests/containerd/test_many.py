"""Many containers of real containerd, and 200 operations with kills of both: nothing leaks, and the store is whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.containerd import Containerd, image_of_busybox
from support.daemon import wait_for

from .test_real import IMAGE, LIMIT, nothing_left

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")
