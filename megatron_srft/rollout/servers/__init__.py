"""The engine on vLLM servers (engine.py), how one is started (serve.py), and what runs inside it (worker.py)."""
