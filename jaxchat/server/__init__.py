"""The API that OpenAI's clients speak, on one or several engines.

`app.py` puts it together, `serve.py` runs it; `scripts/chat_web.py` is the command.
"""
