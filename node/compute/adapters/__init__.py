"""Adapters on disk and in memory: reading what ``peft`` writes, holding what is in use."""
