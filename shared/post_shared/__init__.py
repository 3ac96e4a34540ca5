"""Shared by both sides of POST: language models, soft prompts, tasks, losses, prompt files and API schemas."""
