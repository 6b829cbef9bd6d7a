"""Where independent tasks run; knows no task."""
