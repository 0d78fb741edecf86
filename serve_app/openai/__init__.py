"""OpenAI's files, uploads and fine-tuning API under /v1, as a second face of the same log: docs/openai.md."""
