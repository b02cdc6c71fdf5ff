"""The engine, which trains any `task.Task`."""
