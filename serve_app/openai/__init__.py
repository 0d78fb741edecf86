"""OpenAI's API under /v1: files, uploads, fine-tuning, models, chat and webhooks. It uses the same event log as our own
API: docs/openai.md."""
