"""What `recipes/compare.py` is made of: tasks, methods, cells, results."""
