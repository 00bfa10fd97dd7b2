"""Processes of the operating system: programs with all their children, private folders, heartbeats."""
