"""What happened: the job vocabulary, the fold, the event store, and the two actors that keep events and log lines.

Imports nothing of `trainers` or `serve_app`, and no torch. The actors are in `events.actors`, which imports Ray.
"""
