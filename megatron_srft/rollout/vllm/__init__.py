"""The engine on vLLM in the trainer's own processes (engine.py), and what is known of vLLM itself."""
