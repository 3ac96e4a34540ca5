"""What both sides of POST need: language models, soft prompts, tasks, losses, prompt files and API schemas."""
