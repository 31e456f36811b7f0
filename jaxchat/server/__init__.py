"""The API that OpenAI's clients speak, on one or several engines, and the chat page.

`app.py` puts it together, `serve.py` runs it; `scripts/chat_web.py` is the command. The page is the
folder `page/`, which `page.py` serves.
"""
