"""The benchmarks of cowfs: each file ``bench_*.py`` measures one claim, against peers, in the same run.

Rules that every figure here obeys:

1. A claim is a ratio (or a bound in its own unit) of *medians*, and what it is compared with ran in the same
   process, interleaved: A B C A B C, never A A B B.
2. Inputs come from fixed seeds, and are built once in a work folder.
3. Each measurement that writes gets a fresh file system (tmpfs, or ext4 made by mkfs on a loop device): ext4 walks past
   recently deleted inodes, and a second run on a used one measures that instead.
4. Everything is mounted in a private mount namespace, every server is our own child and dies with us.
5. A peer that the host lacks is reported with its reason, and its comparisons say "not measured".

Three ways to run the same measurements: ``python -m benchmarks`` (or ``make bench``) writes the report,
``pytest benchmarks --benchmark-only`` shows them in pytest-benchmark's table, ``cowfs bench`` runs a chosen set
on the user's own disk. All names here are imported relatively, because the folder is also installed as the
package ``cowfs_benchmarks``.
"""
