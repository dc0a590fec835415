"""What a process tells of itself and of what it does: numbers, spans, logs, and answers to questions."""
