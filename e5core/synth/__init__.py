"""Training records written by language models over any OpenAI-compatible chat API; nothing here imports torch."""
