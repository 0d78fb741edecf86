"""Webhooks: registered URLs are called when a job is over. docs/webhooks.md, docs/decisions/0016-webhooks.md.

`deliverer.Webhooks` follows the event log and sends; `store` keeps endpoints and deliveries; `targets` decides where a
webhook may be sent. They run in the dispatcher's process.
"""
