"""What the computer has: devices, threads, streams, byte counts, the time."""
