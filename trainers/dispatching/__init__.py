"""Which jobs run, and when: the one process that compares the event log with the cluster, and what it decides by."""
