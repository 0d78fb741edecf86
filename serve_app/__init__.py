"""The door: HTTP in front of the event log. `app` is the Ray Serve application."""

from serve_app.deployment import app

__all__ = ["app"]
