"""The server: an API that OpenAI's clients speak, and the chat page on top of it."""
