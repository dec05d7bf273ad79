"""The conformance suite for drivers. Needs pytest (``pip install cowfs-storage[test]``).

A driver passes when a class of four lines does::

    from cowfs.testing import DriverSuite

    class TestMine(DriverSuite):
        driver = "mine"            # its name in the entry-point group cowfs.drivers

Every method is a claim about any driver, from the invariants in :mod:`cowfs.driver.interface` and the claims of the
suites of containerd's snapshotters and of containers/storage, checked through a :class:`cowfs.Store` and real mounts.
Fixtures to override: ``place`` (a directory to put stores in), ``store``.
"""

from cowfs.testing.suite import DriverSuite
from cowfs.testing.trees import Seen, differences, tree_of

__all__ = ["DriverSuite", "Seen", "differences", "tree_of"]
