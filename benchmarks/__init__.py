"""Benchmarks: each verifies equal answers first, interleaves the rivals in one process, and writes what it measured."""

import os

# Before torch and TVM are loaded: threads that spin while they wait for work would take the processors from the next
# subject, and TVM's pool has half of the processors by default.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")
os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count() or 1))
