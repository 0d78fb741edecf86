"""Decides which jobs run, and when: the dispatcher, which compares the event log with the cluster, and its rules."""
