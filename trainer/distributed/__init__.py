"""Processes: distributed context, rendezvous, signals and the watchdog."""
