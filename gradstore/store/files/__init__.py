"""Feature files on disk: every byte read or written, checked, locked and published."""
