"""The event log: a job's config and events, the fold that turns events into a job, the store that keeps them, the log
lines of jobs, and the Ray actors of both.

Imports nothing of `trainers` or `serve_app`, and no torch. The actors are in `events.actors`, which imports Ray.
"""
