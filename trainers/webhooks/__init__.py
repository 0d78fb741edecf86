"""Webhooks: whoever asked for it is told when a job is over. docs/webhooks.md, docs/decisions/0016-webhooks.md.

`deliverer.Webhooks` follows the event log and sends; `store` remembers who is to be told what; `targets` says where a
webhook may go. They run in the dispatcher's process.
"""
